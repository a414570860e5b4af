"""Every artifact on a file system that lies: FAULTS 11, 32 and 36, by real ranks.

What fails once ends a stage with 75 and the name of the file, and the next start ends as on an
honest file system; so does a run on a mount that is odd for good.
"""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.faults.lying import (
    LIES,
    MOUNTS,
    OTHER_USER,
    as_process,
    in_processes,
    lies_of,
    once,
    ranks_can_be_lied_to,
    told_to,
)
from support.ranks import ROOT, started_ranks
from support.tiny_run import make_run, metrics_of, same_training

from dpo_dist.errors import EXIT_RESTART
from dpo_dist.reference.parts import part_paths
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status

LAST_STEP = 10
STAGES = ("prepare", "reference", "train", "export", "verify", "report")
RANKS = {"reference": 2, "train": 2}


class Honest:
    """A run whose stages are made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        make_run(folder)

    def before(self, stage: str) -> Path:
        """The run folder as a stage finds it."""
        folder = self.folder / f"before {stage}"
        if not folder.exists():
            number = STAGES.index(stage)
            if number:
                self.after(STAGES[number - 1])
            shutil.copytree(self.out, folder) if number else folder.mkdir()
        return folder

    def after(self, stage: str) -> Path:
        """The run folder with what the stage has left, and maybe more."""
        done = self.folder / f"after {stage}"
        if not done.exists():
            self.before(stage)
            with pytest.MonkeyPatch.context() as patch:
                for name in LIES:
                    patch.delenv(name, raising=False)
                codes, said = ran(stage, self, self.out)
            assert set(codes) == {0}, said
            done.mkdir()
        return self.out


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    with pytest.MonkeyPatch.context() as patch:
        ranks_can_be_lied_to(patch)
        return Honest(tmp_path_factory.mktemp("honest"))


def ran(stage: str, honest: Honest, out: Path, *overrides: str) -> tuple[list[int], str]:
    """A stage as a launcher starts it: the exit codes, and what was said by whom to listen to."""
    run_yaml = [str(honest.folder / "run.yaml"), f"run.dir={out}", *overrides]
    words = ["report", str(out)] if stage == "report" else [stage, *run_yaml]
    paths = RunDir(out)
    if stage != "report":
        paths.log_dir(stage, paths.count_attempts(stage) + 1).mkdir(parents=True)
    with started_ranks(RANKS.get(stage, 1), as_process, *words) as ranks:
        results = ranks.wait(timeout_s=300, grace_s=15)
    telling = [r for r in results if r.exit_code == EXIT_RESTART] or results
    return [r.exit_code for r in results], "\n".join(r.output for r in telling)


def same(stage: str, honest: Honest, out: Path) -> None:
    """Fails unless a stage left what it leaves on an honest file system."""
    one, other = RunDir(honest.after(stage)), RunDir(out)
    if stage == "prepare":
        assert contents(one.pairs_dir, "*.arrow") == contents(other.pairs_dir, "*.arrow") != {}
        assert manifest(one.pairs_dir) == manifest(other.pairs_dir)
    elif stage == "reference":
        assert rows(one) == rows(other) != []
    elif stage == "train":
        same_training(one.root, other.root, LAST_STEP)
        assert len(metrics_of(other.root)) == len({json.dumps(x) for x in metrics_of(other.root)})
    elif stage == "export":
        weights = contents(one.export_dir, "*.safetensors")
        assert weights == contents(other.export_dir, "*.safetensors") != {}
        assert {path.name for path in one.model_dir(False).iterdir()} == {
            path.name for path in other.model_dir(False).iterdir()
        }
    elif stage == "verify":
        assert checks(one) == checks(other) != {}
    else:
        names = {path.name for path in one.report_dir.iterdir()}
        assert {path.name for path in other.report_dir.iterdir()} == names
    if stage != "report":
        own = read_status(other.status_path)["stages"][stage]
        assert own["state"] == "finished"
    left = [path.name for path in other.root.rglob(".*")]
    # the numbers of parts, and a heartbeat that the end of its process cut off
    left = [n for n in left if not (n.endswith(".rows.taken") or n.startswith(".heartbeat."))]
    assert not left, left


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(pattern)}


def manifest(folder: Path) -> Any:
    return json.loads((folder / "MANIFEST.json").read_text())


def rows(paths: RunDir) -> list[bytes]:
    """The rows of the reference store, whatever parts they are in."""
    (store,) = (path.parent for path in paths.reference_dir.rglob("part-000000.rows"))
    found = [path.read_bytes()[80:] for path in part_paths(store)]
    return sorted(part[i : i + 24] for part in found for i in range(0, len(part), 24))


def checks(paths: RunDir) -> dict[str, Any]:
    text = paths.verify_path.read_text().replace(str(paths.root), "RUN")
    return {k: v for k, v in json.loads(text).items() if "time" not in k}


# (stage, operation, part of the path, which one): what each artifact is written through
PLACES = [
    ("prepare", "write", "/.pairs.partial/", 3),
    ("prepare", "fsync", "/.pairs.partial/", 2),
    ("prepare", "open", "/run.lock", 1),
    ("prepare", "write", "/.status.json", 1),
    ("reference", "write", "/reference/", 1),
    ("reference", "open", "/pairs/", 2),
    ("train", "write", "/checkpoints/", 9),
    ("train", "fsync", "/checkpoints/", 3),
    ("train", "rename", "/checkpoints/step-000004", 1),
    ("train", "write", "/metrics.jsonl", 4),
    ("train", "write", "/.status.json", 5),
    ("train", "open", "/reference/", 1),
    ("train", "write", "/logs/", 4),
    ("export", "write", "/export/", 4),
    ("export", "open", "/checkpoints/", 3),
    ("verify", "open", "/export/", 3),
    ("verify", "write", "/.verify.json", 1),
    ("report", "write", "/.report.partial/", 1),
]
ERRORS = {"ESTALE": errno.ESTALE, "EIO": errno.EIO, "ETIMEDOUT": errno.ETIMEDOUT}
CASES = [
    pytest.param(
        *place, list(ERRORS)[number % 3], id="-".join(map(str, place)).replace("/", ""),
        marks=pytest.mark.slow,
    )
    for number, place in enumerate(PLACES)
]  # fmt: skip


@pytest.mark.fault(
    36,
    "ESTALE, EIO or ETIMEDOUT once, in a write, fsync, open or rename of any artifact",
    becomes="the file is named, exit 75; the next start ends the same",
)
@pytest.mark.parametrize(("stage", "operation", "part", "number", "name"), CASES)
def test_fault_36_what_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Honest,
    stage: str, operation: str, part: str, number: int, name: str,
) -> None:  # fmt: skip
    out = tmp_path / "run" / "out"
    shutil.copytree(honest.before(stage), out)
    ranks_can_be_lied_to(monkeypatch)
    for key, value in lies_of(out.parent, **once(operation, part, number, ERRORS[name])).items():
        monkeypatch.setenv(key, value)
    codes, said = ran(stage, honest, out)
    (path,) = told_to(out.parent)
    if "/logs/" in part:  # a line of a log is lost, the run is not
        assert set(codes) == {0}, said
        return
    # rank 0 tells, or 1 does; the other may wait for it until it is killed
    assert EXIT_RESTART in codes and set(codes) <= {1, EXIT_RESTART, -signal.SIGKILL}, (codes, said)
    assert "This may pass: start the same command again." in said, said
    assert any(name in said for name in names_of(Path(path), out)), f"{path}: {said}"
    assert "Traceback" not in said, said
    codes, said = ran(stage, honest, out)
    assert set(codes) == {0}, said
    same(stage, honest, out)


@pytest.mark.fault(
    36,
    "the same under `dpo-dist prepare` and `dpo-dist run`",
    becomes="started again by itself, up to the caps of `restart`",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "part"), [("prepare", "/.pairs.partial/"), ("run", "/checkpoints/")]
)
def test_fault_36_a_command_goes_on_by_itself(
    tmp_path: Path, honest: Honest, command: str, part: str
) -> None:
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dpo_dist", command, honest.folder / "run.yaml", f"run.dir={out}"],
        env=in_processes(lies_of(out.parent, **once("write", part, 3, errno.EIO))),
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    said = done.stderr + done.stdout
    (path,) = told_to(out.parent)
    assert done.returncode == 0 and any(name in said for name in names_of(Path(path), out)), said
    for stage in ("prepare",) if command == "prepare" else ("prepare", "reference", "train"):
        same(stage, honest, out)


def names_of(path: Path, out: Path) -> list[str]:
    """What tells which file it was: the name that it gets, or the artifact it belongs to."""
    artifact, name = path.relative_to(out).parts[0], path.name
    final = name[1:].rpartition(".")[0] if name.startswith(".") else name
    return [f"/{final}", str(out / artifact.removeprefix(".").removesuffix(".partial"))]


def mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Honest, lies: dict[str, Any],
    *overrides: str,
) -> None:  # fmt: skip
    """A whole run on such a mount ends as on an honest one."""
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    ranks_can_be_lied_to(monkeypatch)
    for key, value in lies_of(out.parent, **lies).items():
        monkeypatch.setenv(key, value)
    for stage in STAGES:
        # a stage's processes import for longer than that; these are forked from one that has
        time.sleep(lies.get("LIE_LATE", 0) / 1000)
        codes, said = ran(stage, honest, out, *overrides)
        assert set(codes) == {0}, said
        same(stage, honest, out)


@pytest.mark.fault(
    11,
    "no flock; no hard links; what a node renames is seen by others 3 s later",
    becomes="the run of an honest file system",
)
@pytest.mark.slow
@pytest.mark.parametrize("mount", ["no flock", "no links", "late renames", "all at once"])
def test_fault_11_a_run_ends_as_on_an_honest_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Honest, mount: str
) -> None:
    mounted(
        tmp_path, monkeypatch, honest, MOUNTS[mount],
        *([f"checkpoint.trusted_owners=[{OTHER_USER}]"] if "LIE_OWNER" in MOUNTS[mount] else []),
    )  # fmt: skip


@pytest.mark.fault(
    32,
    "a mount whose files all belong to another user",
    becomes="said at the start, with the key that lets it go on",
)
@pytest.mark.slow
def test_fault_32_files_of_another_owner_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Honest
) -> None:
    out = tmp_path / "run" / "out"
    shutil.copytree(honest.before("train"), out)
    ranks_can_be_lied_to(monkeypatch)
    for key, value in lies_of(out.parent, **MOUNTS["another owner"]).items():
        monkeypatch.setenv(key, value)
    codes, said = ran("train", honest, out)
    assert set(codes) == {2} and f"checkpoint.trusted_owners=[{OTHER_USER}]" in said, said
    codes, said = ran("train", honest, out, f"checkpoint.trusted_owners=[{OTHER_USER}]")
    assert set(codes) == {0}, said
    same("train", honest, out)
