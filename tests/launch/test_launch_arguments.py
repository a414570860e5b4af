"""What launchers are told: what they do not understand is refused before anything is submitted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import ROOT

LAUNCH, SLURM = ROOT / "launch", ROOT / "slurm"
PROGRAMS = sorted(p.name for p in LAUNCH.glob("*.py") if "__main__" in p.read_text())
CONFIG = "{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}"
STAGES = "doctor prepare reference train export verify push"
# `sbatch` that leaves a trace: what is refused must not get as far as this
SBATCH = '#!/bin/sh\necho "$@" >>"$(dirname "$0")/submitted"\necho 7\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a run.yaml, and an sbatch that writes `submitted`."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    return tmp_path


def run(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    search = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=120,
        env=inherited | {"PATH": search, "COLUMNS": "200"} | variables,
    )  # fmt: skip


def python(
    folder: Path, program: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, LAUNCH / program, *arguments, **variables)


def refused(done: subprocess.CompletedProcess[str], words: str, folder: Path) -> None:
    assert done.returncode == 2, f"{done.stdout}{done.stderr}"
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "submitted").exists() and not (folder / "out").exists()


def test_the_programs_are_these() -> None:
    assert PROGRAMS == ["attempt.py", "ray_launcher.py", "slurm_launcher.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_nothing_at_all(folder: Path, program: str) -> None:
    for flag in ("--help", "-h"):
        shown = python(folder, program, flag)
        assert shown.returncode == 0 and shown.stdout.startswith(f"Usage: {program} ")
    refused(python(folder, program), "Usage: ", folder)


def test_the_same_words_as_those_of_a_sweep(folder: Path) -> None:
    ours = python(folder, "slurm_launcher.py", "--help").stdout
    theirs = run(folder, sys.executable, "-m", "dpo_dist", "sweep", "--help").stdout
    for words in ("RUN.YAML", "The run config.", "--dry-run", "Only print the commands."):
        assert words in ours and words in theirs


@pytest.mark.parametrize(
    "command",
    [
        ["slurm_launcher.py", "run.yaml", "--dryrun"],
        ["slurm_launcher.py", "--dryrun", "run.yaml", "objective.beta=0.1"],
        ["ray_launcher.py", "run.yaml", "--dryrun"],
        ["attempt.py", "begin", "train", "run.yaml", "--dryrun"],
        ["attempt.py", "judge", "train", "run.yaml", "--dryrun"],
    ],
    ids=" ".join,
)
def test_an_unknown_option(folder: Path, command: list[str]) -> None:
    refused(python(folder, *command), "No such option: --dryrun", folder)


@pytest.mark.parametrize(
    "command",
    [["slurm_launcher.py"], ["ray_launcher.py"], ["attempt.py", "begin", "doctor"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("objective.beta=-1", "objective.beta: -1; expected a number greater than 0"),
        ("again", "override 'again'; expected section.key=value. For example"),
    ],
)
def test_an_override_that_is_none(
    folder: Path, command: list[str], override: str, words: str
) -> None:
    refused(python(folder, *command, "run.yaml", override), words, folder)


def test_the_last_stage_of_a_chain_is_looked_at_before_the_first_is_submitted(
    folder: Path,
) -> None:
    done = python(folder, "slurm_launcher.py", "run.yaml", "slurm.stages.verify.options=[qos]")
    refused(done, "error: slurm.options: 'qos'; expected options of sbatch", folder)


def test_what_is_right_is_submitted(folder: Path) -> None:
    done = python(folder, "slurm_launcher.py", "run.yaml", "objective.beta=0.2")
    assert done.returncode == 0, done.stderr
    submitted = (folder / "submitted").read_text().splitlines()
    assert len(submitted) == 6
    assert all(line.endswith("/slurm/dpo.sh run.yaml objective.beta=0.2") for line in submitted)


@pytest.mark.parametrize("command", [["begin"], ["judge"]])
def test_an_unknown_stage(folder: Path, command: list[str]) -> None:
    refused(
        python(folder, "attempt.py", *command, "trian", "run.yaml"),
        f"error: stage 'trian'; expected one of {STAGES}. Correct it, or DPO_STAGES if it comes "
        "from there.",
        folder,
    )


def test_an_unknown_stage_for_ray(folder: Path) -> None:
    """It ran nothing, and ended well."""
    done = python(folder, "ray_launcher.py", "run.yaml", DPO_STAGES="prepare trian")
    refused(done, f"error: stage 'trian'; expected one of {STAGES}.", folder)


def test_ray_that_is_not_installed(folder: Path) -> None:
    program = f"import sys; sys.path[0] = '{LAUNCH}'; sys.modules['ray'] = None; "
    program += "import ray_launcher; ray_launcher.start(ray_launcher.main)"
    done = run(folder, sys.executable, "-c", program, "run.yaml")
    words = "error: ray is not installed; expected the extra `ray`. pip install 'dpo-dist[ray]'\n"
    refused(done, words, folder)


SBATCH_USAGE = "expected sbatch [options of sbatch] slurm/dpo.sh run.yaml [section.key=value ...]\n"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "no run config"),
        (["run.yaml", "--dryrun"], "--dryrun behind the script"),
        (["--nodes=4", "run.yaml"], "--nodes=4 behind the script"),
    ],
)
def test_the_batch_script(folder: Path, arguments: list[str], found: str) -> None:
    done = run(folder, "bash", SLURM / "dpo.sh", *arguments)
    refused(done, f"dpo.sh: {found}; {SBATCH_USAGE}", folder)


def test_the_batch_script_and_an_unknown_stage(folder: Path) -> None:
    """All names are looked at before the first stage runs."""
    done = run(folder, "bash", SLURM / "dpo.sh", "run.yaml", DPO_STAGES="prepare trian")
    refused(done, f"dpo.sh: DPO_STAGES has trian; expected some of {STAGES}\n", folder)


def test_the_last_job_of_a_sweep(folder: Path) -> None:
    """It would submit the sweep again."""
    done = run(folder, "bash", SLURM / "sweep_table.sh", "run.yaml", "--train-only", "--slurm")
    words = "sweep_table.sh: --slurm; expected RUN.YAML, SECTION.KEY=VALUE and --train-only\n"
    refused(done, words, folder)


USAGE = "expected head TOKEN_FILE or node TOKEN_FILE HEAD_ADDRESS:PORT, then options of ray start"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], f"ray_up.sh: nothing; {USAGE}\n"),
        (["haed", "token"], f"ray_up.sh: haed; {USAGE}\n"),
        (["head"], f"ray_up.sh: no file for the token; {USAGE}\n"),
        (["head", "--port=6379"], f"ray_up.sh: no file for the token; {USAGE}\n"),
        (["node", "token"], f"ray_up.sh: no address of the head; {USAGE}\n"),
        (["node", "token", "--block"], f"ray_up.sh: no address of the head; {USAGE}\n"),
    ],
)
def test_a_node_of_ray(folder: Path, arguments: list[str], words: str) -> None:
    refused(run(folder, LAUNCH / "ray_up.sh", *arguments), words, folder)


def test_a_head_with_an_unknown_option_keeps_the_token(folder: Path) -> None:
    """A new one would shut everybody out of the head that still runs with the old one."""
    pytest.importorskip("ray")
    (folder / "token").write_text("old")
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(folder, LAUNCH / "ray_up.sh", "head", "token", "--prot=6379", PATH=search)
    refused(done, "No such option '--prot'", folder)
    assert (folder / "token").read_text() == "old"


def test_a_node_without_a_token(folder: Path) -> None:
    pytest.importorskip("ray")
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(folder, LAUNCH / "ray_up.sh", "node", "token", "10.0.0.1:6379", PATH=search)
    refused(
        done, "ray_up.sh: no token in token; expected one there: start the head first\n", folder
    )


def test_help_of_a_node(folder: Path) -> None:
    shown = run(folder, LAUNCH / "ray_up.sh", "--help")
    assert shown.returncode == 0 and "  launch/ray_up.sh head TOKEN_FILE [opt" in shown.stdout
