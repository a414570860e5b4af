"""What happens to one rank of a training, or to each at another step: FAULTS 1, 5, 6, 7, 37."""

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.faults.at_call import struck, with_pairs_noted
from support.ranks import Ranks, started_ranks, wait_until
from support.tiny_run import make_run, metrics_of, same_training, succeed_on

from dpo_dist.errors import EXIT_RESTART
from dpo_dist.run import attempts
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status

pytestmark = pytest.mark.timeout(600)
LAST_STEP = 10
DOWN_S = 30.0  # what the promise allows
PLAN = "training.job:Job.micro_batches"  # of a step; the first call is the step-0 gate's


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there, and which is trained on two ranks."""
    path = make_run(tmp_path_factory.mktemp("one_rank"))
    succeed_on(1, "prepare", path)
    succeed_on(2, "reference", path)
    with started_ranks(2, training, str(path.parent / "pairs"), "", "train", str(path)) as ranks:
        assert [result.exit_code for result in ranks.wait(300, grace_s=10)] == [0, 0]
    return path


def training(noted: str, fault: str, *arguments: str) -> None:
    """A command as one rank; the pairs of its steps go into a file of this rank."""
    path = Path(f"{noted}-{os.environ['RANK']}")

    def note(step: int, pairs: list[int]) -> None:
        with path.open("a") as stream:
            stream.write(json.dumps([step, pairs]) + "\n")

    with_pairs_noted(note, fault, *arguments)


def pairs_of(noted: Path) -> dict[int, list[int]]:
    """The pairs of every step over both ranks, as it was trained last."""
    steps: dict[int, list[int]] = defaultdict(list)
    for rank in (0, 1):
        lines = Path(f"{noted}-{rank}").read_text().splitlines()
        for step, pairs in dict(map(json.loads, lines)).items():
            steps[step] += pairs
    return steps


def copy_of(run_yaml: Path, name: str) -> RunDir:
    """A run folder with the same pairs and reference, and the log folder of an attempt."""
    paths = RunDir(run_yaml.parent / name)
    for part in ("pairs", "reference"):
        shutil.copytree(run_yaml.parent / "out" / part, paths.root / part)
    paths.log_dir("train", 1).mkdir(parents=True)
    return paths


def codes_of(ranks: Ranks, grace_s: float = DOWN_S) -> list[int]:
    return [result.exit_code for result in ranks.wait(300, grace_s=grace_s)]


@pytest.mark.fault(
    1,
    "SIGKILL of rank 1 between the backward and the update of step 6",
    becomes="down within 30 s; goes on from step 4: metrics, weights and the pairs of every step "
    "equal an unbroken run to the bit",
)
@pytest.mark.slow
def test_fault_01_a_rank_is_killed_in_mid_step(run_yaml: Path, record_property: Any) -> None:
    paths, noted = copy_of(run_yaml, "killed"), run_yaml.parent / "pairs-killed"
    arguments = ["train", str(run_yaml), f"run.dir={paths.root}"]
    with started_ranks(2, training, str(noted), "kill@train.step=6,rank=1", *arguments) as ranks:
        wait_until(lambda: ranks.processes[1].poll() is not None, 300)
        began = time.monotonic()
        assert codes_of(ranks) == [1, -signal.SIGKILL]
        assert time.monotonic() - began < DOWN_S
    assert sorted(path.name for path in paths.checkpoints_dir.glob("step-*")) == ["step-000004"]
    with started_ranks(2, training, str(noted), "", *arguments) as ranks:
        wait_until(lambda: metrics_of(paths.root)[-1]["step"] >= 6, 300)
        record_property("recovered_s", time.monotonic() - began)
        assert codes_of(ranks) == [0, 0]
    same_training(run_yaml.parent / "out", paths.root, LAST_STEP)
    assert pairs_of(noted) == pairs_of(run_yaml.parent / "pairs")


@pytest.mark.fault(
    5,
    "an exception on rank 1 while rank 0 waits in an all-gather: of a parameter, of a checkpoint",
    becomes="both leave within 30 s; the exception of rank 1 is the reason",
)
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("engine.forward.pair_scorer:score_pairs", 4),
        pytest.param("training.checkpointing:_check_finite", 1, marks=pytest.mark.slow),
    ],
)
def test_fault_05_a_rank_raises_while_the_other_gathers(
    run_yaml: Path, where: str, call: int
) -> None:
    paths = copy_of(run_yaml, f"raised-{call}")
    fault = f"raise@{where}={call},rank=1"
    with started_ranks(2, struck, fault, "train", str(run_yaml), f"run.dir={paths.root}") as r:
        first, second = r.wait(300, grace_s=DOWN_S)
    assert (first.exit_code, second.exit_code) == (1, 1), first.output + second.output
    assert "Traceback" in second.output and "InjectedFaultError: at call" in second.output
    outcome = attempts.judge(paths, "train")
    assert outcome.verdict == "restart" and outcome.reason.startswith("rank 1: InjectedFaultError(")


EVALUATION = "training.evaluation:evaluate"
LOAD = "engine.model.policy:build_policy"


@pytest.mark.fault(
    6,
    "USR2 to rank 1 alone; USR2 and TERM to the ranks in different steps",
    becomes="both stop after the same step with a checkpoint, `stopped`, exit 75",
)
@pytest.mark.fault(
    7,
    "TERM during the save that USR2 asked for; USR2 during evaluation and model load",
    becomes="the checkpoint is whole, exit 75; the restart equals an unbroken run",
)
@pytest.mark.parametrize(
    ("fault", "stopped_at"),
    [
        pytest.param(f"usr2@{PLAN}=4,rank=1", 3, id="one rank"),
        pytest.param(
            f"usr2@train.step=2,rank=1;term@{PLAN}=4,rank=0", 3, id="different steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"usr2@{PLAN}=4,rank=1;term@train.commit=1,rank=0", 3, id="save"),
        pytest.param(f"usr2@{EVALUATION}=1,rank=0", 6, id="evaluation", marks=pytest.mark.slow),
        pytest.param(f"term@{LOAD}=1,rank=1", 1, id="load", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_fault_06_and_07_signals_stop_all_ranks_at_one_step(
    run_yaml: Path, fault: str, stopped_at: int, tmp_path: Path
) -> None:
    paths = copy_of(run_yaml, tmp_path.name)
    arguments = ["train", str(run_yaml), f"run.dir={paths.root}"]
    with started_ranks(2, struck, fault, *arguments) as ranks:
        assert codes_of(ranks) == [EXIT_RESTART] * 2
    assert read_status(paths.status_path)["state"] == "stopped"
    names = sorted(path.name for path in paths.checkpoints_dir.iterdir())
    assert names[-1] == f"step-{stopped_at:06d}" and not names[0].startswith(".")
    succeed_on(2, *arguments)
    same_training(run_yaml.parent / "out", paths.root, LAST_STEP)


@pytest.mark.fault(
    7,
    "USR2 to rank 1 in the first wave of the reference pass",
    becomes="both stop with 75; the next pass scores the rest",
)
def test_fault_07_a_signal_in_the_reference_pass(run_yaml: Path) -> None:
    paths = copy_of(run_yaml, "reference-stopped")
    shutil.rmtree(paths.root / "reference")
    arguments = [
        "reference", str(run_yaml), f"run.dir={paths.root}", "reference.micro_batch_tokens=100",
    ]  # fmt: skip
    fault = "usr2@engine.forward.scoring:score_on_all_ranks=1,rank=1"
    with started_ranks(2, struck, fault, *arguments) as ranks:
        assert codes_of(ranks) == [EXIT_RESTART] * 2
    assert read_status(paths.status_path)["state"] == "stopped"
    said = succeed_on(2, *arguments)
    assert " of 50 pairs to score" in said and "50 of 50 pairs" not in said


@pytest.mark.fault(
    37,
    "SIGKILL of rank 1 of 3 while it reads its share of a checkpoint of 2 ranks",
    becomes="down within 30 s; the checkpoint is as it was, and the restart goes on from it",
)
@pytest.mark.slow
def test_fault_37_a_rank_dies_in_a_conversion(run_yaml: Path) -> None:
    paths = copy_of(run_yaml, "converted")
    kept = run_yaml.parent / "out" / "checkpoints" / "step-000008"
    shutil.copytree(kept, paths.checkpoints_dir / kept.name)
    arguments = ["train", str(run_yaml), f"run.dir={paths.root}"]
    fault = "kill@engine.checkpoints.resharding:_fill_fragment=2,rank=1"
    with started_ranks(3, struck, fault, *arguments) as ranks:
        codes = codes_of(ranks)
    assert codes[1] == -signal.SIGKILL and codes[0] == codes[2] == 1
    assert [path.name for path in paths.checkpoints_dir.iterdir()] == [kept.name]
    assert f"step {LAST_STEP}/" in succeed_on(3, *arguments)
