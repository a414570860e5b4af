"""Ranks that hang, as processes: FAULTS 4 and 38.

A rank is stopped by a signal, sleeps, or waits for a file system that does not answer. In each case
it is named with its host and section, the ranks that can write their stacks, and all leave.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.faults.hanging import Kind, hang_in, late_of, mark_of
from support.ranks import ROOT, started_ranks, wait_until
from support.tiny_run import make_run, metrics_of, same_training, succeed_on

from dpo_dist.cli.rank import launch
from dpo_dist.config.run_config import load_config
from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import EXIT_RESTART
from dpo_dist.run import attempts, pipeline
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status
from dpo_dist.run.topology import from_environment
from dpo_dist.watch import watchdog

pytestmark = pytest.mark.timeout(600)
QUICK = ["train.num_epochs=4", "checkpoint.every_steps=4", "eval.every_steps=5"]
LEAVING_S = 30.0  # what the promise allows after a limit


def ready(folder: Path, stage: str) -> tuple[Path, RunDir]:
    """A run with what a stage needs."""
    run_yaml, paths = make_run(folder), RunDir(folder / "out")
    before = ("prepare", "reference", "train", "export", "verify")
    for name in before[: before.index(stage)]:
        succeed_on(2 if name in ("reference", "train") else 1, name, run_yaml)
    return run_yaml, paths


@pytest.mark.fault(
    1,
    "SIGKILL of rank 1 in training, by `dpo-dist train`",
    becomes="named with its signal, started again; metrics and weights equal an unbroken run",
)
@pytest.mark.slow
def test_fault_01_a_killed_rank_is_named_and_training_goes_on_by_itself(tmp_path: Path) -> None:
    said, paths = struck_and_gone_on(tmp_path, signal.SIGKILL)
    assert "rank 1 was killed by signal 9, often out of memory" in said
    assert "goes on after step" in (paths.log_dir("train", 2) / "rank0000.log").read_text()


@pytest.mark.fault(
    4,
    "SIGSTOP of rank 1 in training, by `dpo-dist train`",
    becomes=(
        "found by `silent`: named with its host, stacks written, started again; metrics "
        "and weights equal an unbroken run"
    ),
)
@pytest.mark.slow
def test_fault_04_a_stopped_rank_is_named_and_training_goes_on_by_itself(tmp_path: Path) -> None:
    said, paths = struck_and_gone_on(tmp_path, signal.SIGSTOP)
    assert f"error: rank 1 on {socket.gethostname()} in " in said
    assert [rank["rank"] for rank in read_status(paths.status_path)["late"]] == [1]
    assert "most recent call first" in (paths.log_dir("train", 1) / "rank0000.log").read_text()


def struck_and_gone_on(folder: Path, number: int) -> tuple[str, RunDir]:
    """What `dpo-dist train` said of which a rank got a signal, and its run; its numbers are those
    of an unbroken one."""
    run_yaml, paths = ready(folder, "train")
    shutil.copytree(paths.root, folder / "unbroken")
    succeed_on(2, "train", run_yaml, *QUICK, f"run.dir={folder}/unbroken")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dpo_dist", "train", str(run_yaml), *QUICK, "watchdog.silent=10"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        written = paths.metrics_path
        wait_until(lambda: written.exists() and len(metrics_of(paths.root)) > 5, timeout_s=300)
        os.kill(rank_of(launcher.pid, 1), number)
        _, said = launcher.communicate(timeout=300)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0
    assert read_status(paths.status_path)["restarts"]["total"] == 1
    same_training(folder / "unbroken", paths.root, 20)
    return said, paths


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher on this machine started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    place = f"RANK={rank}".encode()
    (found,) = (
        pid for pid in children if place in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return int(found)


def stopped_at_once(number: int) -> None:
    """A rank that stops as soon as it is in the group, and one that waits for it."""
    topology = from_environment()
    watchdog.start(
        WatchdogSection(silent=3.0), topology.rank, 2, log=2, note_path=None,
        tell=lambda error, late: None,
    )  # fmt: skip
    with collectives.process_group(topology):
        if topology.rank == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        collectives.barrier()


@pytest.mark.fault(
    4,
    "SIGSTOP of rank 0 or 1 as the group begins, before it has said a word",
    becomes="found by `silent`; the other leaves with 75",
)
@pytest.mark.parametrize("number", [0, 1])
def test_fault_04_a_rank_that_stops_as_the_group_begins_is_missed(number: int) -> None:
    with started_ranks(2, stopped_at_once, number) as ranks:
        waiting = ranks.processes[1 - number]
        wait_until(lambda: waiting.poll() is not None, timeout_s=60)
        assert waiting.returncode == EXIT_RESTART


@pytest.mark.fault(
    4,
    "a sleep of a rank before a collective",
    becomes="found by the section: the late rank is named, all write stacks and leave with 75",
)
@pytest.mark.fault(
    38,
    "SIGSTOP, a sleep or a read that never returns, of rank 0 or 1, in load, "
    "self-check, step, evaluation, checkpoint, reference pass",
    becomes="found by `silent` or the section: the late rank is named, all leave with 75",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "section", "rank", "kind"),
    [
        ("train", "step", 1, "dead file system"),
        ("train", "step", 0, "stopped"),
        ("train", "step", 1, "asleep"),
        ("train", "evaluation", 1, "stopped"),
        ("train", "checkpoint", 1, "stopped"),
        ("train", "checkpoint", 0, "dead file system"),
        ("train", "load", 1, "stopped"),
        ("train", "self_check", 1, "dead file system"),
        ("reference", "reference", 1, "stopped"),
        ("reference", "reference", 0, "asleep"),
    ],
)
def test_fault_38_a_hang_of_a_rank_ends_all(
    tmp_path: Path, stage: str, section: str, rank: int, kind: Kind
) -> None:
    run_yaml, paths = ready(tmp_path, stage)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    settings = [f"watchdog.{section}=6", "watchdog.silent=12"]
    place = (section, rank, kind, str(pipe), stage, str(run_yaml), *settings)
    log_dir = paths.log_dir(stage, paths.count_attempts(stage) + 1)
    log_dir.mkdir(parents=True)
    with started_ranks(2, hang_in, *place) as ranks:
        wait_until(mark_of(pipe).exists, 300)
        began = time.monotonic()
        results = ranks.wait(timeout_s=300, grace_s=15)
        took = time.monotonic() - began
    codes = [result.exit_code for result in results]
    stopped = kind == "stopped"
    assert codes[1 - rank] == EXIT_RESTART, results[1 - rank].output
    assert codes[rank] == (-signal.SIGKILL if stopped else EXIT_RESTART)
    named = {"rank": rank, "host": socket.gethostname(), "section": section}
    assert late_of(paths.status_path) == [named]
    own = read_status(paths.status_path)["stages"][stage]
    assert (own["state"], own["restartable"], own["exit_code"]) == ("failed", True, EXIT_RESTART)
    assert f"rank {rank} on {named['host']} in {section}" in own["error"]
    within = re.search(r"within ([\d,]+) s \(watchdog", own["error"])  # more after slow steps
    assert within is not None and took < int(within.group(1).replace(",", "")) + LEAVING_S
    for each, result in enumerate(results):
        if not stopped or each != rank:
            log = result.output if each else (log_dir / "rank0000.log").read_text()
            assert "most recent call first" in log and log.splitlines()[-1].startswith("error: ")


@pytest.mark.fault(
    38,
    "SIGSTOP, a sleep or a read that never returns, in prepare, export, verify",
    becomes="found by `silent` or the section; the next run is whole",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "section", "kind"),
    [
        ("prepare", "prepare", "stopped"),
        ("prepare", "prepare", "dead file system"),
        ("export", "export", "dead file system"),
        ("export", "export", "stopped"),
        ("verify", "verify", "asleep"),
    ],
)
def test_fault_38_a_stage_of_one_process_is_watched_too(
    tmp_path: Path, stage: str, section: str, kind: Kind
) -> None:
    """One that is stopped is woken for its stacks, and killed, by the process beside it."""
    run_yaml, paths = ready(tmp_path, stage)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    limit = 600 if kind == "stopped" else 5  # it is woken for a second, and has made no progress
    settings = [f"watchdog.{section}={limit}", "watchdog.silent=8"]
    log_dir = paths.log_dir(stage, paths.count_attempts(stage) + 1)
    log_dir.mkdir(parents=True)
    place = (section, 0, kind, str(pipe), stage, str(run_yaml), *settings)
    with started_ranks(1, hang_in, *place) as ranks:
        wait_until(mark_of(pipe).exists, 300)
        (result,) = ranks.wait(timeout_s=60 + LEAVING_S)
    assert result.exit_code == (-signal.SIGKILL if kind == "stopped" else EXIT_RESTART)
    assert f"error: rank 0 on {socket.gethostname()} in {section}" in result.output
    assert late_of(paths.status_path) == [
        {"rank": 0, "host": socket.gethostname(), "section": section}
    ]
    log = (log_dir / "rank0000.log").read_text()
    assert "most recent call first" in log and log.splitlines()[-1].startswith("error: ")
    succeed_on(1, stage, run_yaml)


@pytest.mark.fault(8, "a stage that hangs each time", becomes="started again up to the cap")
def test_a_launcher_starts_a_stage_again_that_hung_up_to_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are small programs that end as the watchdog makes them end."""
    run_yaml, paths = tmp_path / "run.yaml", RunDir(tmp_path / "out")
    run_yaml.write_text(
        f"{{run: {{dir: {paths.root}}}, model: {{path: m}}, data: {{train: [{{path: a}}]}}}}"
    )
    config = load_config(run_yaml, ["restart.max_without_progress=2", "local.workers=1"])
    program = (
        "import sys; from pathlib import Path; from dpo_dist.run.status import update_stage\n"
        f"path, tries = Path('{paths.status_path}'), Path('{tmp_path}/tries')\n"
        "count = len(tries.read_text()) if tries.exists() else 0\n"
        "tries.write_text('x' * (count + 1))\n"
        "if count == int(sys.argv[1]): update_stage(path, 'train', 'finished'); sys.exit(0)\n"
        "update_stage(path, 'train', 'failed', exit_code=75, restartable=True, late=[{}])\n"
        "sys.exit(75)"
    )

    def launched(hangs: int) -> int:
        monkeypatch.setattr(
            pipeline, "stage_argv", lambda *_: [sys.executable, "-c", program, str(hangs)]
        )
        (tmp_path / "tries").unlink(missing_ok=True)
        return launch(pipeline.TRAIN, config, run_yaml, [])

    assert launched(2) == 0 and paths.count_attempts("train") == 3
    with pytest.raises(attempts.RestartLimitError, match="restart.max_without_progress"):
        launched(9)
    assert paths.count_attempts("train") == 6
