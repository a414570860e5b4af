"""Objectives in training: the same step on any ranks and packing; runs without a reference."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.commands import succeed
from support.ranks import run_ranks
from support.tiny_run import make_run, metrics_of, succeed_on, weights_of

from dpo_dist.config.run_config import load_config

STEPS = 2
OVERRIDES = (
    f"train.max_steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.probe_pairs=2",
    "train.warmup_ratio=0",
)  # fmt: skip


def reference_worker(run_yaml: str, overrides: Sequence[str]) -> None:
    from dpo_dist.stages import reference

    reference.run(load_config(Path(run_yaml), overrides))


def train_worker(run_yaml: str, overrides: Sequence[str]) -> None:
    from dpo_dist.stages import train

    train.run(load_config(Path(run_yaml), overrides))


def prepared(folder: Path, family: str = "llama") -> Path:
    """A run whose pairs and reference are there."""
    from dpo_dist.stages import prepare

    run_yaml = make_run(folder, family)
    prepare.run(load_config(run_yaml))
    run_ranks(1, reference_worker, str(run_yaml), [])
    return run_yaml


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("llama"))


def trained(run_yaml: Path, ranks: int, name: str, *overrides: str) -> Path:
    """The folder of another run on the same pairs and reference, after training it."""
    out = run_yaml.parent / name
    shutil.copytree(run_yaml.parent / "out", out, dirs_exist_ok=True)
    run_ranks(ranks, train_worker, str(run_yaml), [f"run.dir={out}", *OVERRIDES, *overrides])
    return out


def assert_same(one: Path, other: Path, atol: float = 2e-5) -> None:
    """Equal metrics and weights but for rounding."""
    for left, right in zip(metrics_of(one), metrics_of(other), strict=True):
        shared = {k: v for k, v in left.items() if k != "tokens_saved_by_sharing"}
        assert shared == pytest.approx({k: right[k] for k in shared}, abs=1e-4)
    left, right = weights_of(one, STEPS), weights_of(other, STEPS)
    worst = max(float((left[name] - right[name]).abs().max()) for name in left)
    assert worst < atol, worst


def test_pairs_of_a_step_are_coupled_whatever_ranks_and_packing(llama: Path) -> None:
    objective = ("objective.loss=[aot,sft]", "objective.loss_weights=[1.0,0.1]")
    one = trained(llama, 1, "aot-1", *objective)
    two = trained(llama, 2, "aot-2", *objective, "train.micro_batch_tokens=100")
    assert_same(one, two)


@pytest.mark.slow
def test_a_mixture_of_weighted_losses_whatever_ranks_and_packing(llama: Path) -> None:
    objective = (
        "objective.loss=[sigmoid,bco_pair]", "objective.loss_weights=[0.8,0.2]",
        "objective.use_weighting=true",
    )  # fmt: skip
    one = trained(llama, 1, "wpo-1", *objective)
    two = trained(llama, 2, "wpo-2", *objective, "train.micro_batch_tokens=100")
    assert_same(one, two)


@pytest.mark.slow
def test_dropout_is_the_same_in_both_forwards(llama: Path) -> None:
    # a global batch of one pair: nothing to sort, so that aot is sigmoid
    settings = (
        "adapter.dropout=0.3", "train.global_batch_size=1", "adapter.rank=4",
        "train.gradient_checkpointing=true",
    )  # fmt: skip
    sorted_alone = trained(llama, 1, "dropout-aot", "objective.loss=aot", *settings)
    alone = trained(llama, 1, "dropout-sigmoid", *settings)
    assert_same(sorted_alone, alone)


SIMPO = ("objective.loss=simpo", "objective.beta=2.0")


def test_without_a_reference_there_is_no_pass_and_a_gate(llama: Path) -> None:
    out = llama.parent / "simpo"
    shutil.copytree(llama.parent / "out" / "pairs", out / "pairs")
    stages = ("reference", "train", "export", "verify")
    run = (llama, f"run.dir={out}", *SIMPO, *OVERRIDES)
    told = "".join(succeed_on(1, stage, *run) for stage in stages)
    assert "reference: not needed, objective.loss simpo has no reference" in told
    assert "largest difference from the model's own logits" in told
    assert not (out / "reference").exists()
    assert json.loads((out / "verify.json").read_text())["passed"]
    first, *_ = metrics_of(out)
    assert -20 < first["logps/chosen"] < 0  # of a token
    assert first["rewards/chosen"] == pytest.approx(2.0 * first["logps/chosen"])


@pytest.mark.slow
def test_status_and_evaluation_without_a_reference(llama: Path) -> None:
    run_yaml, out = llama, llama.parent / "simpo-evaluated"
    shutil.copytree(llama.parent / "out" / "pairs", out / "pairs")
    succeed("run", run_yaml, f"run.dir={out}", *SIMPO, *OVERRIDES)
    status = succeed("reference", run_yaml, "--status", f"run.dir={out}", *SIMPO)
    assert json.loads(status.stdout) == {"not_needed": "objective.loss simpo"}
    shown = succeed("evaluate", run_yaml, f"run.dir={out}", *SIMPO, *OVERRIDES)
    assert "rewards/margins" in shown.stdout + shown.stderr
    evaluation = json.loads((out / "evaluate.json").read_text())
    assert "before" not in evaluation and evaluation["after"]["rewards/chosen"] < 0


@pytest.mark.slow
def test_orpo_whatever_ranks_and_packing(llama: Path) -> None:
    one = trained(llama, 1, "orpo-1", "objective.loss=orpo")
    two = trained(llama, 2, "orpo-2", "objective.loss=orpo", "train.micro_batch_tokens=100")
    assert_same(one, two)
    first, *_ = metrics_of(one)
    assert first["loss"] == pytest.approx(
        first["nll_loss"] - 0.5 * first["log_odds_ratio"], abs=1e-5
    )


@pytest.mark.slow
def test_routers_are_balanced_over_a_step_whatever_ranks_and_packing(tmp_path: Path) -> None:
    mixtral = prepared(tmp_path, "mixtral")
    plain = trained(mixtral, 1, "plain")
    one = trained(mixtral, 1, "aux-1", "objective.router_aux_loss_coef=0.5")
    two = trained(
        mixtral, 2, "aux-2", "objective.router_aux_loss_coef=0.5", "train.micro_batch_tokens=100"
    )
    assert_same(one, two)
    first, *_ = metrics_of(one)
    without, *_ = metrics_of(plain)
    assert first["loss"] == pytest.approx(without["loss"] + 0.5 * first["aux_loss"], abs=1e-5)
    balanced, unbalanced = weights_of(one, STEPS), weights_of(plain, STEPS)
    assert max(float((balanced[n] - unbalanced[n]).abs().max()) for n in balanced) > 1e-4


@pytest.mark.slow
def test_answers_past_the_shorter_one_count_less_in_policy_and_reference(llama: Path) -> None:
    run_yaml, settings = llama, ("objective.ld_alpha=0.2", "train.micro_batch_tokens=100")
    out = run_yaml.parent / "ld-2"
    shutil.copytree(run_yaml.parent / "out", out)
    refused = "holds 50 rows scored with mask_rule"
    with pytest.raises(AssertionError, match=refused):
        run_ranks(1, train_worker, str(run_yaml), [f"run.dir={out}", *OVERRIDES, *settings])
    run_ranks(2, reference_worker, str(run_yaml), [f"run.dir={out}", *settings])
    two = trained(run_yaml, 2, "ld-2", *settings)
    assert metrics_of(two)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
