"""Whole runs in which two ranks share every row, against runs in which each has rows of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import run_ranks
from support.tiny_run import fail_on, make_run, metrics_of, succeed_on, weights_of

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import scoring_contract, store_root
from dpo_dist.reference.store import open_store
from dpo_dist.run.run_dir import RunDir
from dpo_dist.stages import prepare

pytestmark = pytest.mark.timeout(300)
SHARED = "train.sequence_parallel=2"
LAST = 4
SETTINGS = [
    f"train.max_steps={LAST}", "checkpoint.every_steps=2", "eval.every_steps=2", "local.workers=1",
    "eval.on_start=true", "logging.every_steps=1", "train.warmup_ratio=0",
    "train.adam_eps=1e-5",  # where a gradient is all but 0, AdamW would make steps of its rounding
]  # fmt: skip
LORA = ["adapter.rank=4", "adapter.target_modules=[q_proj, v_proj, down_proj]"]
RECOMPUTED = "train.gradient_checkpointing=true"
CASES: dict[str, list[str]] = {
    "zero3": ["train.deepspeed=zero3", RECOMPUTED, "reference.sharding=zero3"],
    "zero2, adapter": ["train.deepspeed=zero2", RECOMPUTED, *LORA],
    "zero1": ["train.deepspeed=zero1"],
    "zero0": ["train.deepspeed=zero0"],
    "zero2": ["train.deepspeed=zero2"],
    "zero1, adapter": ["train.deepspeed=zero1", *LORA],
    "zero3, adapter": ["train.deepspeed=zero3", RECOMPUTED, *LORA],
    "coupled pairs": ["train.deepspeed=zero2", "objective.loss=bco_pair"],
    "padded": ["train.deepspeed=zero2", "model.layout=padded"],
    "tiles": ["train.tiled_mlp=16", "train.offload_activations=true", RECOMPUTED],
}  # fmt: skip
QUICK = ("zero2, adapter",)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs are there."""
    path = make_run(tmp_path_factory.mktemp("shared-rows"))
    prepare.run(load_config(path))
    return path


def trained(run_yaml: Path, name: str, *overrides: str) -> Path:
    """The folder of a run on the same pairs, after two ranks scored its reference and trained."""
    out = run_yaml.parent / name
    out.mkdir(exist_ok=True)
    if not (out / "pairs").exists():
        (out / "pairs").symlink_to(run_yaml.parent / "out" / "pairs")
    for stage in ("reference", "train"):
        arguments = str(run_yaml), stage, [f"run.dir={out}", *SETTINGS, *overrides]
        run_ranks(2, worker, *arguments, timeout_s=200)
    return out


def worker(run_yaml: str, stage: str, overrides: list[str]) -> None:
    from dpo_dist.stages import reference, train

    stages = {"reference": reference, "train": train}
    stages[stage].run(load_config(Path(run_yaml), overrides))


def reference_of(run_yaml: Path, out: Path, overrides: list[str]) -> Any:
    """The stored log-probs of all pairs."""
    config = load_config(run_yaml, [f"run.dir={out}", *SETTINGS, *overrides])
    layout = json.loads(RunDir(out).reference_status_path.read_text())["layout"]
    store = open_store(store_root(config), scoring_contract(RunModels(config), layout))
    pairs = [open_pairs(RunDir(out).pairs_dir, split) for split in ("train", "eval")]
    return np.concatenate([store.lookup(split.keys) for split in pairs])


def same_run(one: Path, other: Path) -> dict[str, float]:
    """Fails unless all metrics and weights agree to 1e-5; returns how far apart they are."""
    ours, theirs = metrics_of(one), metrics_of(other)
    assert len(ours) > LAST
    metrics = furthest(ours, theirs)
    left, right = weights_of(one, LAST), weights_of(other, LAST)
    assert left.keys() == right.keys()
    weights = max((float((left[name] - right[name]).abs().max()), name) for name in left)
    assert metrics[0] <= 1e-5 and weights[0] <= 1e-5, (metrics, weights)
    return {"metrics": metrics[0], "weights": weights[0]}


def furthest(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest difference of a metric, relative above 1, and its name."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs] and ours
    return max(
        (abs(a[key] - b[key]) / max(1.0, abs(b[key])), key)
        for a, b in zip(ours, theirs, strict=True)
        for key in a
        # before the first update margins are 0 but for rounding, which then decides on accuracies
        if isinstance(a[key], int | float) and ("accuracies" not in key or a["step"] > 1)
    )


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_shared_rows_train_as_rows_of_ones_own(run_yaml: Path, case: str) -> None:
    overrides = CASES[case]
    alone = trained(run_yaml, f"{case} alone", *overrides)
    shared = trained(run_yaml, f"{case} shared", SHARED, *overrides)
    print(case, same_run(shared, alone))
    stored = [reference_of(run_yaml, out, overrides) for out in (shared, alone)]
    np.testing.assert_allclose(*stored, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resume_may_share_rows_and_stop_sharing_them(run_yaml: Path, stage: int) -> None:
    name = f"resumed {stage}"
    settings = [f"train.deepspeed=zero{stage}", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    alone = trained(run_yaml, f"{name} alone", *settings)
    shared = continued(run_yaml, f"{name} shared", alone, 1, SHARED, *settings)
    again = continued(run_yaml, f"{name} again", shared, 3, *settings)
    right = weights_of(alone, LAST)
    for run in (shared, again):
        left = weights_of(run, LAST)
        assert max(float((left[key] - right[key]).abs().max()) for key in right) <= 1e-5
        ours, theirs = (
            [line for line in metrics_of(each) if line.get("step") == LAST] for each in (run, alone)
        )
        assert furthest(ours, theirs)[0] <= 1e-5


def continued(run_yaml: Path, name: str, of: Path, step: int, *overrides: str) -> Path:
    """As `trained`, from the checkpoint of a step of another run and on its reference."""
    folder = Path("checkpoints") / f"step-{step:06d}"
    shutil.copytree(of / folder, run_yaml.parent / name / folder)
    (run_yaml.parent / name / "reference").symlink_to(of / "reference")
    return trained(run_yaml, name, *overrides)


@pytest.mark.slow
def test_a_whole_run_of_the_command_shares_rows(tmp_path: Path) -> None:
    """Export, verification and evaluation too; verify finds what training computed."""
    path = make_run(tmp_path)
    overrides = [*SETTINGS, SHARED, "train.deepspeed=zero2", "run.dir=" + str(tmp_path / "out")]
    succeed_on(1, "prepare", path, *overrides)
    for stage, ranks in (("reference", 2), ("train", 2), ("export", 1), ("verify", 1)):
        succeed_on(ranks, stage, path, *overrides)
    succeed_on(2, "verify", path, *overrides)
    succeed_on(2, "evaluate", path, *overrides)
    shared = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    succeed_on(2, "evaluate", path, *overrides, "train.sequence_parallel=1")
    alone = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert shared.keys() == alone.keys() and shared["num_pairs"] == alone["num_pairs"]
    for key, value in alone["after"].items():
        if isinstance(value, float):
            assert shared["after"][key] == pytest.approx(value, abs=1e-5), key


def test_ranks_that_would_be_left_over_are_refused(run_yaml: Path) -> None:
    for stage in ("doctor", "reference", "train", "evaluate"):
        error = fail_on(3, stage, run_yaml, SHARED)
        assert error == (
            "error: train.sequence_parallel: 2 on 3 ranks; expected a number of ranks that it "
            "divides. Start a multiple of 2 ranks, or set train.sequence_parallel to 1."
        )
