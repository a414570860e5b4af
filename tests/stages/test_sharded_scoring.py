"""Evaluate and verify on two ranks that hold a model's halves: the numbers of whole models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import run_ranks, started_ranks
from support.tiny_export import TrainedRun, make_trained_run

from dpo_dist.config.run_config import load_config
from dpo_dist.stages import export, verify

pytestmark = pytest.mark.timeout(400)
KINDS = {
    "full": ("export.dtype=float32",),
    "dora": ("adapter.rank=3", "adapter.use_dora=true", "export.dtype=float32"),
    "qlora": ("adapter.rank=3", "model.quantization=nf4"),
    "lora": ("adapter.rank=3", "adapter.modules_to_save=[lm_head]", "export.dtype=float32"),
}


def worker(stage: str, run_yaml: str, overrides: list[str]) -> list[float]:
    """Runs a stage; of each model that it scored with the share of the bytes that this rank held.

    Without DeepSpeed's exception for small parameters, which are all that a tiny model has.
    """
    from torch.nn.modules import module as hooks

    from dpo_dist.engine.sharding import ds_config
    from dpo_dist.stages import evaluate, reference, verify

    inference_config, held = ds_config.inference_config, dict[int, float]()

    def every_parameter_sharded(dtype: str, world_size: int) -> dict[str, Any]:
        config = inference_config(dtype, world_size)
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        return config

    def before(module: Any, inputs: Any) -> None:
        if type(module).__name__ == "PairScorer":
            held[id(module)] = max(held.get(id(module), 0), share_held(module))

    ds_config.inference_config = every_parameter_sharded
    hooks.register_module_forward_pre_hook(before)
    stages = {"reference": reference, "evaluate": evaluate, "verify": verify}
    stages[stage].run(load_config(Path(run_yaml), overrides))
    return list(held.values())


def share_held(module: torch.nn.Module) -> float:
    """Bytes of parameters in this process, of all that the model has."""
    held = whole = 0
    for parameter in module.parameters():
        here = parameter.numel() + getattr(parameter, "ds_tensor", parameter.new_empty(0)).numel()
        held += parameter.itemsize * here
        whole += parameter.itemsize * getattr(parameter, "ds_numel", parameter.numel())
    return held / whole


SLOW = ("dora", "qlora")  # a minute each


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(An exported run whose reference is there, its overrides.)"""
    overrides = list(KINDS[request.param])
    run = make_trained_run(tmp_path_factory.mktemp(request.param), "llama", *overrides)
    export.run(run.config)
    run_ranks(1, worker, "reference", str(yaml_of(run)), overrides)
    return run, overrides


def yaml_of(run: TrainedRun) -> Path:
    return run.paths.root.parent / "run.yaml"


def on_two_ranks(stage: str, exported: Any, sharding: str) -> list[list[float]]:
    run, overrides = exported
    settings = [*overrides, f"reference.sharding={sharding}"]
    return run_ranks(2, worker, stage, str(yaml_of(run)), settings, timeout_s=200)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The numbers of a report by path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}/{key}").items()}
    return {name: value}


def test_truth_13_evaluate_holds_its_share_and_gives_the_same_numbers(exported: Any) -> None:
    run, _ = exported
    reports = {}
    for sharding, share in (("whole", 1.0), ("zero3", 0.5)):
        for held in on_two_ranks("evaluate", exported, sharding):
            assert held == pytest.approx([share], abs=0.02)
        reports[sharding] = flat(json.loads(run.paths.evaluate_path.read_text()))
    assert reports["zero3"] == pytest.approx(reports["whole"], abs=1e-4)


def test_truth_13_verify_holds_its_share_and_passes(exported: Any) -> None:
    run, _ = exported
    quantized = run.config.model.quantization is not None
    verify.run(run.config)
    alone = json.loads(run.paths.verify_path.read_text())
    for held in on_two_ranks("verify", exported, "zero3"):
        models = len(alone["exports"]) + quantized  # the adapter on both bases
        assert held == pytest.approx([0.5] * models, abs=0.02)
    report = json.loads(run.paths.verify_path.read_text())
    assert report["passed"] is True
    for ours, theirs in zip(report["checks"], alone["checks"], strict=True):
        assert (ours["name"], ours["passed"]) == (theirs["name"], theirs["passed"])
        assert ours["max_difference"] == pytest.approx(theirs["max_difference"], abs=1e-4)


@pytest.mark.parametrize("exported", ["full"], indirect=True)
def test_what_does_not_fit_is_told_by_all_ranks(exported: Any, tmp_path: Path) -> None:
    run, overrides = exported
    path = run.paths.model_dir(merged=False) / "model.safetensors"
    kept = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        arguments = "verify", str(yaml_of(run)), [*overrides, "reference.sharding=zero3"]
        with started_ranks(2, worker, *arguments) as ranks:
            results = ranks.wait(timeout_s=120, grace_s=30)
    finally:
        path.write_bytes(kept)
    assert all("VerificationError: 3 of 4 checks failed" in result.output for result in results)
    failed = json.loads(run.paths.verify_path.read_text())["checks"]
    assert [check["name"] for check in failed if not check["passed"]] == [
        "full: files", "full: names, shapes and types", "full: strict load",
    ]  # fmt: skip
