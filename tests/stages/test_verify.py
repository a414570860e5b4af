"""The verify stage: what it passes, and that every kind of damage to an export fails it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_export import TrainedRun, make_trained_run, write_checkpoint
from support.tiny_run import make_run
from support.weights.trained_weights import InMemory

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.engine.export.weight_changes import POLICY
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.load import load_model
from dpo_dist.errors import ArtifactError, VerificationError
from dpo_dist.run.run_dir import RunDir
from dpo_dist.stages import export, prepare, verify
from dpo_dist.verification import probe

LORA = ("adapter.rank=3", "adapter.alpha=4", "export.dtype=float32")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    run = make_trained_run(tmp_path_factory.mktemp("lora"), "llama", *LORA)
    export.run(run.config)
    return run


def copy_of(run: TrainedRun, folder: Path) -> RunConfig:
    shutil.copytree(run.paths.root, folder / "out")
    source = run.paths.root.parent
    return load_config(source / "run.yaml", [*LORA, f"run.dir={folder / 'out'}"])


def report_of(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.run.dir / "verify.json").read_text())


def failures(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Runs verify, which must fail, and returns the failed checks by name."""
    with pytest.raises(VerificationError) as error:
        verify.run(config)
    assert error.value.exit_code == 1
    report = report_of(config)
    assert report["passed"] is False
    failed = {check["name"]: check for check in report["checks"] if not check["passed"]}
    assert str(error.value).startswith(f"{len(failed)} of {len(report['checks'])} checks failed")
    return failed


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", ()),
        ("llama_tied", ()),
        ("qwen3", ("export.dtype=bfloat16",)),
        ("llama", ("model.dtype=bfloat16",)),
        ("qwen3_moe", ("adapter.rank=3",)),
        ("gpt2", ("adapter.rank=3", "adapter.use_dora=true", "model.dtype=bfloat16")),
        ("llama_tied", ("adapter.rank=3", "adapter.modules_to_save=[lm_head]")),
        ("mamba", ("export.dtype=float32",)),
    ],
)
def test_a_right_export_passes(family: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = make_trained_run(tmp_path, family, "export.dtype=float32", *overrides)
    export.run(run.config)
    assert verify.run(run.config) == run.paths.verify_path
    report = report_of(run.config)
    assert report["passed"] is True
    names = [check["name"] for check in report["checks"]]
    kinds = ["full"] if run.config.adapter is None else ["adapter", "merged"]
    for kind in kinds:
        for part in ("files", "strict load", "tokenizer", "answer", "probe, plain forward"):
            assert f"{kind}: {part}" in names
    compared = [check for check in report["checks"] if check["max_difference"] is not None]
    assert len(compared) == 2 * len(kinds)
    assert all(0 <= c["max_difference"] <= c["tolerance"] for c in compared)


def damage_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(export_dir: Path) -> None:
        path = export_dir / "merged" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def remove_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.bias"] = torch.zeros(32)


def widen_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(33)


def halve_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()


def nudge_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][5] += 0.05


def change_template(export_dir: Path) -> None:
    (export_dir / "merged" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def swap_tokens(export_dir: Path) -> None:
    path = export_dir / "merged" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


def drop_adapter_tensor(export_dir: Path) -> None:
    path = export_dir / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)


def change_alpha(export_dir: Path) -> None:
    path = export_dir / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8}))


def remove_config(export_dir: Path) -> None:
    (export_dir / "merged" / "config.json").unlink()


@pytest.mark.fault(27, "ten kinds of damage to an export", becomes="not verified, the check named")
@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (damage_weights(remove_norm), {"merged: names, shapes and types", "merged: strict load"}),
        (damage_weights(add_bias), {"merged: names, shapes and types", "merged: strict load"}),
        (damage_weights(halve_norm), {"merged: names, shapes and types"}),
        (damage_weights(widen_norm), {"merged: names, shapes and types", "merged: strict load"}),
        (
            damage_weights(nudge_head),
            {"merged: probe, packed forward", "merged: probe, plain forward"},
        ),
        (change_template, {"merged: tokenizer"}),
        (swap_tokens, {"merged: tokenizer"}),
        (drop_adapter_tensor, {"adapter: strict load"}),
        (change_alpha, {"adapter: probe, packed forward", "adapter: probe, plain forward"}),
        (remove_config, {"merged: names, shapes and types", "merged: strict load"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # peft only warns
def test_damage_fails(
    damage: Callable[[Path], None], failing: set[str], exported: TrainedRun, tmp_path: Path
) -> None:
    config = copy_of(exported, tmp_path)
    damage(tmp_path / "out" / "export")
    failed = failures(config)
    assert failing <= set(failed), failed
    kind = next(iter(failing)).split(":")[0]
    assert f"{kind}: files" in failed, "the export's own record of its files must notice"
    assert {name.split(":")[0] for name in failed} == {kind}, "only the damaged folder fails"


def test_the_error_names_the_first_failure(exported: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(exported, tmp_path)
    change_template(tmp_path / "out" / "export")
    with pytest.raises(VerificationError) as error:
        verify.run(config)
    folder = tmp_path / "out" / "export" / "merged"
    assert str(error.value) == (
        "2 of 15 checks failed, first merged: files: "
        f"{folder}/chat_template.jinja has another content than was committed; expected an export "
        "that reproduces the training run. "
        f"Do not use it. {tmp_path / 'out' / 'verify.json'} has all checks."
    )


def test_an_export_of_untrained_weights_fails(exported: TrainedRun, tmp_path: Path) -> None:
    """The base model in place of the merged one: everything in order but the numbers."""
    config = copy_of(exported, tmp_path)
    folder = tmp_path / "out" / "export" / "merged"
    shutil.copy(Path(config.model.path) / "model.safetensors", folder / "model.safetensors")
    assert set(failures(config)) == {
        "merged: files", "merged: probe, packed forward", "merged: probe, plain forward",
    }  # fmt: skip


def test_an_update_that_bfloat16_rounds_away_has_its_own_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_trained_run(tmp_path, "llama", "adapter.rank=3", "export.dtype=bfloat16")
    export.run(run.config)
    monkeypatch.setattr(probe, "TOLERANCE", {"bfloat16": 1e-5})
    with pytest.raises(VerificationError) as error:
        verify.run(run.config)
    assert str(error.value).endswith(
        "expected an export that reproduces the training run. bfloat16 may round the update away: "
        "export with export.dtype=float32, or use the adapter unmerged. "
        f"{run.paths.verify_path} has all checks."
    )


def test_without_an_export(exported: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(exported, tmp_path)
    shutil.rmtree(tmp_path / "out" / "export" / "merged")
    with pytest.raises(ArtifactError, match=r"export/merged/MANIFEST.json does not exist"):
        verify.run(config)


def test_a_checkpoint_that_is_gone(exported: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(exported, tmp_path)
    step_dir = tmp_path / "out" / "checkpoints" / "step-000006"
    shutil.rmtree(step_dir)
    with pytest.raises(ArtifactError) as error:
        verify.run(config)
    assert str(error.value) == (
        f"{step_dir} is not the checkpoint that the export was made from; expected that "
        "checkpoint, "
        "with the log-probs to reproduce. "
        f"Delete {tmp_path / 'out' / 'export'} and run `dpo-dist export` again."
    )


def test_another_checkpoint_under_the_same_name(exported: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(exported, tmp_path)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    policy = exported.policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    write_checkpoint(config, policy, exported.trained, step=6)
    with pytest.raises(ArtifactError, match="is not the checkpoint that the export was made from"):
        verify.run(config)


def unmoved_run(folder: Path, *overrides: str) -> RunConfig:
    """A run whose checkpoint holds the weights that training began with, exported."""
    config = load_config(make_run(folder), ["export.dtype=float32", *overrides])
    prepare.run(config)
    policy: Any = load_model(Path(config.model.path), config.model, device=torch.device("cpu"))
    if config.adapter is not None:
        policy = add_adapter(policy, config.adapter, config.model.path)
    trained = {POLICY + n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    write_checkpoint(config, policy.eval(), InMemory(trained), step=2)
    lines = [{"step": n, "grad_norm": 1.5, "learning_rate": (n - 1) * 1e-6} for n in (1, 2)]
    text = "".join(
        json.dumps(line | {"loss": 0.7, "rewards/margins": 0.0}) + "\n" for line in lines
    )
    RunDir(config.run.dir).metrics_path.write_text(text)
    export.run(config)
    return config


@pytest.mark.parametrize("overrides", [(), ("adapter.rank=3",)])
def test_truth_01_an_export_that_equals_the_base_is_refused(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    config = unmoved_run(tmp_path, *overrides)
    kinds = ["adapter", "merged"] if overrides else ["full"]
    failed = failures(config)
    assert sorted(failed) == [f"{kind}: moved by training" for kind in kinds]
    assert failed[f"{kinds[-1]}: moved by training"]["detail"] == (
        "every weight is that of the start of training, to the bit, although 1 of 2 lines of "
        "metrics.jsonl have a gradient and a learning rate"
    )
    metrics = RunDir(config.run.dir).metrics_path
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")  # a first step of warm-up
    verify.run(config)
