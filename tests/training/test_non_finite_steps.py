"""Steps whose gradient or loss is not finite: stopped at or skipped, and never saved or hidden."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.tiny_run import make_run, metrics_of, same_training, succeed_on, weights_of

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints.train_state import read_train_state
from dpo_dist.run.status import describe_status

pytestmark = pytest.mark.timeout(300)
STEPS = ["train.max_steps=5", "checkpoint.every_steps=1", "checkpoint.keep=9", "eval.every_steps=5"]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there."""
    path = make_run(tmp_path_factory.mktemp("non_finite"))
    succeed_on(1, "prepare", path)
    succeed_on(1, "reference", path)
    return path


def poisoned(run_yaml: str, overrides: list[str], where: str, bad: list[int]) -> str:
    """Trains with NaN on the last rank in some steps, in a parameter's gradient or in the loss.

    The error it ends with, if any.
    """
    from dpo_dist.errors import DPODistError
    from dpo_dist.stages import train
    from dpo_dist.training.job import Job

    now = [0]
    real_batches, real_losses = Job.micro_batches, train.pair_losses

    def is_bad() -> bool:
        return now[0] in bad and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def micro_batches(job: Any, step: int) -> Any:
        if not now[0]:
            for name, parameter in job.engine.module.named_parameters():
                if name.endswith(where):
                    parameter.register_hook(spoil)
            for name, module in job.engine.module.named_modules():
                if name.endswith(where):
                    module.register_forward_hook(lambda _, __, out: spoil_gradient_of(out))
        now[0] = step
        return real_batches(job, step)

    def spoil(gradient: Any) -> Any:
        return gradient * float("nan") if is_bad() else None

    def spoil_gradient_of(output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(spoil)

    def pair_losses(*args: Any) -> Any:
        losses = real_losses(*args)
        return losses * float("nan") if where == "loss" and is_bad() else losses

    Job.micro_batches, train.pair_losses = micro_batches, pair_losses
    try:
        train.run(load_config(Path(run_yaml), overrides))
    except DPODistError as error:
        return str(error)
    return ""


def trained(
    run_yaml: Path, name: str, where: str, bad: list[int], *overrides: str, ranks: int = 2
) -> tuple[Path, list[str]]:
    """(The folder of a run on the same pairs and reference, what each rank ended with.)"""
    out = run_yaml.parent / name
    out.mkdir(exist_ok=True)
    for part in ("pairs", "reference"):
        if not (out / part).exists():
            (out / part).symlink_to(run_yaml.parent / "out" / part)
    settings = [f"run.dir={out}", *STEPS, *overrides]
    return out, run_ranks(ranks, poisoned, str(run_yaml), settings, where, bad)


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.fault(
    25,
    "NaN in the loss of one rank",
    becomes="all ranks stop before the update; the pairs are written down",
)
@pytest.mark.fault(
    31,
    "a gradient that is not finite, with a finite loss, on one rank of one and two",
    becomes="all ranks stop before the update; the pairs are written down",
)
@pytest.mark.parametrize(
    ("stage", "ranks", "where"),
    [
        (0, 2, "layers.1.mlp"),  # what flows back through a layer
        (2, 2, "loss"),
        (3, 2, "layers.1.mlp.up_proj.weight"),
        pytest.param(3, 1, "layers.1.mlp", marks=pytest.mark.slow),
        pytest.param(2, 1, "layers.1.mlp.up_proj.weight", marks=pytest.mark.slow),
        pytest.param(0, 1, "layers.1.mlp.up_proj.weight", marks=pytest.mark.slow),
    ],
)
def test_truth_01_a_gradient_that_is_not_finite_stops_the_run(
    run_yaml: Path, stage: int, ranks: int, where: str
) -> None:
    name = f"stop-{stage}-{ranks}"
    out, errors = trained(run_yaml, name, where, [3], f"train.deepspeed=zero{stage}", ranks=ranks)
    path = out / "non_finite" / "step-000003.json"
    what = "the loss or a reward" if where == "loss" else "a gradient"
    who = "a rank that is not known" if where.endswith("weight") else f"rank {ranks - 1}"
    told = (
        f"step 3: {what} is not finite (on {who}; the step's pairs are in {path}); expected finite "
        "numbers. Look at these pairs, and leave bad ones out by data.leave_out; lower "
        "train.learning_rate, or set model.dtype=float32 or train.non_finite=skip."
    )
    assert errors == [told] * ranks
    assert steps_kept(out) == [1, 2]
    written = json.loads(path.read_text())
    pairs = open_pairs(out / "pairs", "train")
    assert len(written["pairs"]) == 8 and {p["rank"] for p in written["pairs"]} == {*range(ranks)}
    for pair in written["pairs"]:
        assert bytes.fromhex(pair["key"]) == pairs.table["pair_key"][pair["index"]].as_py()


SKIP = ["train.non_finite=skip", "train.deepspeed=zero2"]


def rates(out: Path) -> dict[int, float]:
    return {m["step"]: m["learning_rate"] for m in metrics_of(out) if "learning_rate" in m}


@pytest.mark.fault(
    31,
    "a gradient that is not finite at a checkpoint step, to be skipped",
    becomes="weights stay, the schedule goes on, the step is counted, also over a resume",
)
def test_truth_01_a_skipped_step_changes_nothing_and_shifts_nothing(run_yaml: Path) -> None:
    """Also over a resume, which keeps the count; the schedule is that of a run without NaN."""
    clean, errors = trained(run_yaml, "clean", "nowhere", [], *SKIP)
    out, more = trained(run_yaml, "skipped", "layers.1.mlp", [3], *SKIP)
    assert errors == more == ["", ""]
    assert rates(out) == rates(clean)
    for name, weight in weights_of(out, 2).items():
        assert bool((weight == weights_of(out, 3)[name]).all()), name
    assert metrics_of(out)[:2] == metrics_of(clean)[:2], "the pairs of a step, in order"
    counts = [m["skipped_steps"] for m in metrics_of(out) if "loss" in m]
    assert counts == [0, 0, 1, 1, 1]
    assert metrics_of(out)[2]["non_finite"] == ["grad_norm"]
    status = json.loads((out / "status.json").read_text())
    assert status["skipped_steps"] == [3] and status["train"]["skipped_steps"] == 1
    assert ("skipped steps", "3") in describe_status(status)

    again = run_yaml.parent / "skipped-resumed"
    shutil.copytree(out, again, symlinks=True)
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    trained(run_yaml, again.name, "nowhere", [], *SKIP)
    same_training(out, again, 5)
    assert read_train_state(again / "checkpoints" / "step-000005").skipped_steps == [3]


@pytest.mark.fault(
    25,
    "NaN in step after step, to be skipped",
    becomes="skipped up to the cap, then stopped",
)
def test_truth_01_skipping_has_a_cap_and_losses_that_are_not_finite_are_skipped_too(
    run_yaml: Path,
) -> None:
    out, (error, _) = trained(run_yaml, "capped", "loss", [1, 2, 4, 5], *SKIP)
    path = out / "non_finite" / "step-000005.json"
    assert error == (
        f"step 5: the loss or a reward is not finite (on rank 1; the step's pairs are in {path}), "
        "as were those of 3 steps before it; expected at most 3 of 5 steps to skip: more are no "
        "accident. Look at these pairs, and leave bad ones out by data.leave_out; lower "
        "train.learning_rate, or set model.dtype=float32."
    )
    assert [m["step"] for m in metrics_of(out)] == [3], "a step without a loss has no line"
    assert steps_kept(out) == [1, 2, 3, 4]


def spoiled(run_yaml: str, overrides: list[str], what: str) -> str:
    """Trains; on the last rank a weight, or the probe, is not finite when step 2 is saved."""
    import numpy as np
    import torch

    from dpo_dist.errors import DPODistError
    from dpo_dist.stages import train
    from dpo_dist.training import checkpointing

    real_score, is_last = checkpointing.score, os.environ["RANK"] != "0"

    def score(engine: Any, *args: Any) -> Any:
        indices, scores = real_score(engine, *args)
        if engine.global_steps == 2 and is_last:
            if what == "weights":
                embedding = next(engine.module.parameters())
                with torch.no_grad():
                    getattr(embedding, "ds_tensor", embedding).view(-1)[0] = float("inf")
            else:
                scores = scores * np.float32("nan")
        return indices, scores

    checkpointing.score = score
    try:
        train.run(load_config(Path(run_yaml), overrides))
    except DPODistError as error:
        return str(error)
    return ""


@pytest.mark.fault(
    31,
    "a weight or probe that is not finite at a checkpoint step",
    becomes="nothing is committed",
)
@pytest.mark.parametrize(
    ("what", "stage"), [("weights", 3), pytest.param("probe", 0, marks=pytest.mark.slow)]
)
def test_truth_01_a_checkpoint_that_is_not_finite_is_not_committed(
    run_yaml: Path, what: str, stage: int
) -> None:
    out = run_yaml.parent / f"spoiled-{what}"
    out.mkdir()
    for part in ("pairs", "reference"):
        (out / part).symlink_to(run_yaml.parent / "out" / part)
    settings = [f"run.dir={out}", *STEPS, f"train.deepspeed=zero{stage}"]
    named = {"weights": "weights", "probe": "log-probs of the probe"}[what]
    assert (
        run_ranks(2, spoiled, str(run_yaml), settings, what)
        == [
            f"step 2: {named} of rank 1 are not finite; expected finite numbers in a checkpoint. "
            "Nothing was committed: lower train.learning_rate and start again, training continues "
            "from the checkpoint before."
        ]
        * 2
    )
    assert steps_kept(out) == [1]
    assert not list((out / "checkpoints").glob(".step-*"))
