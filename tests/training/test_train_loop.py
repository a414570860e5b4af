"""What surrounds the steps of training: the speed that is reported, and the answers in between."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.tiny_run import NUM_TRAIN, make_run, metrics_of, same_training, succeed_on

from dpo_dist.config.run_config import load_config
from dpo_dist.engine.checkpoints.checkpoint import read_train_state
from dpo_dist.metrics.writer import read_lines

pytestmark = pytest.mark.timeout(300)
STEP_S, PAUSE_S = 1.0, 100.0
PAIRS = 8  # of a step


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there."""
    path = make_run(tmp_path_factory.mktemp("loop"))
    succeed_on(1, "prepare", path)
    succeed_on(1, "reference", path)
    return path


def trained(run_yaml: Path, worker: Callable[..., None], name: str, *overrides: str) -> Path:
    """The folder of a run on the same pairs and reference, after `worker` trained it."""
    out = run_yaml.parent / name
    out.mkdir()
    for part in ("pairs", "reference"):
        (out / part).symlink_to(run_yaml.parent / "out" / part)
    run_ranks(1, worker, str(run_yaml), [f"run.dir={out}", *overrides])
    return out


def worker(run_yaml: str, overrides: list[str]) -> None:
    from dpo_dist.stages import train

    train.run(load_config(Path(run_yaml), overrides))


class Clock:
    """Stands for the module `time`: it moves only with what it has timed."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def timed(self, call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return call(*args, **kwargs)

        return slow


def timed_worker(run_yaml: str, overrides: list[str]) -> None:
    """Trains by a clock on which a step takes STEP_S and everything between steps PAUSE_S."""
    from dpo_dist.engine.sharding import zero
    from dpo_dist.training import records

    clock = Clock()
    records.time = clock  # pyright: ignore[reportAttributeAccessIssue]
    zero.update = clock.timed(zero.update, STEP_S)
    for pause in ("evaluate", "save", "sample"):
        setattr(records.Records, pause, clock.timed(getattr(records.Records, pause), PAUSE_S))
    worker(run_yaml, overrides)


@pytest.mark.parametrize("every_steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_reported_speed_is_that_of_the_steps(run_yaml: Path, every_steps: int) -> None:
    settings = [
        f"logging.every_steps={every_steps}", "train.num_epochs=1", "eval.every_steps=2",
        "checkpoint.every_steps=3", "eval.samples_every_steps=3", "eval.num_samples=1",
        "generate.max_new_tokens=2",
    ]  # fmt: skip
    out = trained(run_yaml, timed_worker, f"speed-{every_steps}", *settings)
    lines = [m for m in read_lines(out / "metrics.jsonl") if "loss" in m]
    assert len(lines) == -(-(NUM_TRAIN // PAIRS) // every_steps)
    assert [m["pairs_per_second"] for m in lines] == [PAIRS / STEP_S] * len(lines)


@pytest.mark.slow
def test_answers_in_training_are_sampled_as_generate_says(run_yaml: Path) -> None:
    settings = [
        "train.max_steps=1", "eval.samples_every_steps=1", "eval.num_samples=2",
        "generate.max_new_tokens=8",
    ]  # fmt: skip
    answers = []
    for name, sampling in {
        "greedy": ["generate.temperature=0"],
        "nucleus-of-one": ["generate.temperature=2", "generate.top_p=1e-6"],
    }.items():
        out = trained(run_yaml, worker, name, *settings, *sampling)
        answers.append([s["answer"] for s in read_lines(out / "samples.jsonl")])
    assert answers[0] == answers[1] and len(answers[0]) == 4


STOPPED_AT = 3


def stopped_worker(run_yaml: str, overrides: list[str]) -> None:
    """Gets USR2 during a step that an evaluation follows."""
    import pytest

    from dpo_dist.run.stop_flag import Stopped
    from dpo_dist.training.job import Job

    def step_of_the_signal(job: Any, step: int) -> Any:
        if step == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGUSR2)
        return real(job, step)

    real = Job.micro_batches
    Job.micro_batches = step_of_the_signal
    with pytest.raises(Stopped, match=f"stopped after step {STOPPED_AT} of"):
        worker(run_yaml, overrides)


@pytest.mark.fault(
    6,
    "USR2 in a step that an evaluation follows",
    becomes="saved at once, evaluated after the restart; equals an unbroken run",
)
def test_a_stopped_run_saves_at_once_and_evaluates_when_it_goes_on(run_yaml: Path) -> None:
    """It goes on with the first step of a decay, at the learning rate of that step."""
    settings = [
        "train.max_steps=6", f"eval.every_steps={STOPPED_AT}", "checkpoint.every_steps=5",
        "train.lr_schedule=wsd", "train.warmup_steps=2", "train.decay_steps=3",
        "train.decay_shape=linear",
    ]  # fmt: skip
    unbroken = trained(run_yaml, worker, "unbroken", *settings)
    out = trained(run_yaml, stopped_worker, "stopped", *settings)
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3]
    assert not any("eval_loss" in line for line in metrics_of(out))
    run_ranks(1, worker, str(run_yaml), [f"run.dir={out}", *settings])
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3, 3, 4, 5, 6, 6]
    same_training(unbroken, out, 6)
    rates = [line["learning_rate"] for line in metrics_of(out) if "learning_rate" in line]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


@pytest.mark.slow
def test_an_early_stop_by_an_evaluation_that_had_to_wait(run_yaml: Path) -> None:
    """The second evaluation in a row that is not good enough is that of the step of the signal."""
    settings = [
        "train.max_steps=6", "eval.every_steps=1", "eval.patience=2", "eval.min_delta=100",
        "checkpoint.best_by=eval_rewards/margins",
    ]  # fmt: skip
    unbroken = trained(run_yaml, worker, "ended", *settings)
    assert metrics_of(unbroken)[-1]["step"] == STOPPED_AT
    out = trained(run_yaml, stopped_worker, "ended-later", *settings)
    run_ranks(1, worker, str(run_yaml), [f"run.dir={out}", *settings])
    same_training(unbroken, out, STOPPED_AT)
    states = [read_train_state(path / "checkpoints" / "step-000003") for path in (unbroken, out)]
    assert states[0].evaluations == states[1].evaluations
