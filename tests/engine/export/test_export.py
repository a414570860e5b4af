"""Exported weights against the trained model itself, in transformers and in peft."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import FAMILIES, tiny_model
from support.weights.trained_weights import InMemory, adapted, randomly_trained, save_base
from transformers import AutoModelForCausalLM

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.export.weight_changes import adapter_changes, check_adapter, full_changes
from dpo_dist.engine.export.weight_streams import adapter_weights, model_weights, plan_model
from dpo_dist.engine.model.adapters import add_adapter, write_adapter_config
from dpo_dist.engine.weights.base_weights import build_skeleton, open_base
from dpo_dist.engine.weights.safetensors_writer import write_file, write_shards
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.model_files.files import model_config
from dpo_dist.run.manifest import FileRecord, digest_of_file

MIB = 1 << 20
IDS = torch.arange(3, 40)[None]


def export_full(
    base_dir: Path, trained: InMemory, out: Path, dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MIB,
) -> int:  # fmt: skip
    """Bytes that the progress bar was told."""
    base = open_base(base_dir)
    return export_model(base, full_changes(base, trained), trained, out, dtype, max_shard_bytes)


def export_merged(
    base_dir: Path, adapter: AdapterSection, trained: InMemory, out: Path,
    dtype: torch.dtype = torch.float32,
) -> int:  # fmt: skip
    base = open_base(base_dir)
    policy = add_adapter(build_skeleton(base_dir), adapter, str(base_dir))
    return export_model(base, adapter_changes(base, policy, trained), trained, out, dtype, MIB)


def export_model(
    base: Any, changes: Any, trained: InMemory, out: Path, dtype: torch.dtype, max_shard_bytes: int
) -> int:
    out.mkdir()
    plan = plan_model(base, changes, dtype)
    written: list[int] = []
    records = write_shards(out, model_weights(plan, trained), max_shard_bytes, written.append)
    for file, record in records.items():
        assert record == FileRecord((out / file).stat().st_size, digest_of_file(out / file))
    name = str(dtype).removeprefix("torch.")
    config = json.loads((base.folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(model_config(config, name, plan.breaks_ties)))
    assert sum(written) == sum(spec.num_bytes for spec in plan.specs.values())
    return sum(written)


def load_strictly(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (this is no dict)
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_full_export_is_the_trained_model(family: str, tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", family)
    model = tiny_model(family)
    trained = randomly_trained(model)
    export_full(base_dir, trained, tmp_path / "full")
    assert headers(tmp_path / "full") == headers(base_dir)
    loaded = load_strictly(tmp_path / "full")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not torch.equal(logits(loaded), logits(load_strictly(base_dir)))


def test_full_export_in_shards_and_bfloat16(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "llama")
    trained = randomly_trained(tiny_model("llama"))
    export_full(base_dir, trained, tmp_path / "full", torch.bfloat16, max_shard_bytes=10_000)
    assert len(list((tmp_path / "full").glob("model-*-of-*.safetensors"))) > 3
    loaded = load_strictly(tmp_path / "full", "auto").state_dict()  # pyright: ignore
    for name, tensor in trained.tensors.items():
        assert torch.equal(loaded[name.removeprefix("policy.")], tensor.to(torch.bfloat16)), name


@pytest.mark.fault(26, "tied embeddings", becomes="written once, tied when loaded")
def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "llama_tied")
    trained = randomly_trained(tiny_model("llama_tied"))
    assert "policy.lm_head.weight" not in trained.tensors
    export_full(base_dir, trained, tmp_path / "full")
    assert "lm_head.weight" not in headers(tmp_path / "full")
    loaded = load_strictly(tmp_path / "full")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tied_weights_that_the_base_stores_twice_are_both_written(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "llama_tied")
    path = base_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    trained = randomly_trained(tiny_model("llama_tied"))
    export_full(base_dir, trained, tmp_path / "full")
    written = load_file(tmp_path / "full" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], trained.read("policy.model.embed_tokens.weight"))
    assert load_strictly(tmp_path / "full").config.tie_word_embeddings


def test_what_the_base_keeps_wider_stays_wide(tmp_path: Path) -> None:
    """Some models keep a few tensors, a router's bias say, in float32 among bfloat16."""
    base_dir = save_base(tmp_path / "base", "llama", torch.bfloat16)
    path = base_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    trained = randomly_trained(tiny_model("llama"))
    export_full(base_dir, trained, tmp_path / "full", torch.bfloat16)
    assert headers(tmp_path / "full") == headers(base_dir)


def test_what_loading_leaves_aside_is_copied(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "gpt2")
    path = base_dir / "model.safetensors"
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_file(load_file(path) | mask, path, metadata={"format": "pt"})
    trained = randomly_trained(tiny_model("gpt2"))
    export_full(base_dir, trained, tmp_path / "full")
    assert headers(tmp_path / "full") == headers(base_dir)
    load_strictly(tmp_path / "full")


ADAPTERS = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("qwen2", {"use_dora": True}),
    "rslora and dora": ("llama", {"use_rslora": True, "use_dora": True}),
    "some targets": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "fan_in_fan_out": ("gpt2", {}),
    "fan_in_fan_out dora": ("gpt2", {"use_dora": True}),
    "renamed head": ("gpt_neox", {"target_modules": ["query_key_value", "lm_head"]}),
    "head saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "embeddings and norm saved": ("llama", {"modules_to_save": ["embed_tokens", "norm"]}),
    "embeddings adapted": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "fused experts": ("mixtral", {}),
    "fused experts, other names": ("qwen3_moe", {"use_rslora": True}),
    "fused experts, frozen": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "transposed experts": ("gpt_oss", {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_merged_is_pefts_own_merge(case: str, tmp_path: Path) -> None:
    family, settings = ADAPTERS[case]
    adapter = AdapterSection(rank=3, alpha=4.0, **settings)
    base_dir = save_base(tmp_path / "base", family)
    policy, trained = adapted(tiny_model(family), adapter, base_dir)
    expected = logits(policy)
    export_merged(base_dir, adapter, trained, tmp_path / "merged")
    assert headers(tmp_path / "merged") == headers(base_dir)
    merged = load_strictly(tmp_path / "merged")
    own = copy.deepcopy(policy).merge_and_unload()
    base = load_strictly(base_dir)
    moved = 0
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=2e-6, msg=name)
        moved += not torch.equal(tensor, base.state_dict()[name])
    assert moved >= 1
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-4)
    assert (expected - logits(base)).abs().max() > 1e-2


UNTIED = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "head adapted": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("case", UNTIED)
def test_tied_weights_that_training_took_apart(case: str, tmp_path: Path) -> None:
    """The head gets a tensor of its own, and the config no longer ties it."""
    adapter = AdapterSection(rank=3, alpha=4.0, **UNTIED[case])
    base_dir = save_base(tmp_path / "base", "llama_tied")
    policy, trained = adapted(tiny_model("llama_tied"), adapter, base_dir)
    expected = logits(policy)
    export_merged(base_dir, adapter, trained, tmp_path / "merged")
    added = set(headers(tmp_path / "merged")) - set(headers(base_dir))
    assert added == {"lm_head.weight"}
    merged = load_strictly(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-4)
    assert (expected - logits(load_strictly(base_dir))).abs().max() > 1e-2


def test_merging_into_bfloat16_rounds_once(tmp_path: Path) -> None:
    """W + s B A in float32, then one rounding; not a bfloat16 delta added in bfloat16."""
    adapter = AdapterSection(rank=3, alpha=4.0)
    base_dir = save_base(tmp_path / "base", "llama", torch.bfloat16)
    _, trained = adapted(tiny_model("llama", dtype=torch.bfloat16), adapter, base_dir)
    export_merged(base_dir, adapter, trained, tmp_path / "merged", torch.bfloat16)
    base, merged = (load_file(d / "model.safetensors") for d in (base_dir, tmp_path / "merged"))
    name = "model.layers.1.mlp.up_proj"
    a, b = (
        trained.read(f"policy.base_model.model.{name}.lora_{side}.default.weight") for side in "AB"
    )
    exact = base[f"{name}.weight"].float() + 4.0 / 3 * (b @ a)
    assert torch.equal(merged[f"{name}.weight"], exact.to(torch.bfloat16))
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


IN_PEFT = (
    "rslora and dora", "fan_in_fan_out dora", "renamed head", "embeddings and norm saved",
    "embeddings dora", "fused experts", "fused experts, other names",
    *(f"tied, {case}" for case in UNTIED),
)  # fmt: skip


@pytest.mark.fault(27, "an adapter, loaded with PEFT", becomes="the logits of training")
@pytest.mark.parametrize("case", IN_PEFT)
def test_the_adapter_loads_in_peft(case: str, tmp_path: Path) -> None:
    if case.startswith("tied, "):
        family, settings = "llama_tied", UNTIED[case.removeprefix("tied, ")]
    else:
        family, settings = ADAPTERS[case]
    adapter = AdapterSection(rank=3, alpha=4.0, **settings)
    base_dir = save_base(tmp_path / "base", family)
    policy, trained = adapted(tiny_model(family), adapter, base_dir)
    skeleton = add_adapter(build_skeleton(base_dir), adapter, str(base_dir))
    out = tmp_path / "adapter"
    out.mkdir()
    path = out / "adapter_model.safetensors"
    record = write_file(path, adapter_weights(skeleton, trained, torch.float32))
    assert record == FileRecord(path.stat().st_size, digest_of_file(path))
    write_adapter_config(skeleton, out, "org/base", "v1")
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", "v1")
    assert written["inference_mode"] is True
    assert written["target_modules"] == sorted(written["target_modules"]), "the same in any process"
    loaded = PeftModel.from_pretrained(load_strictly(base_dir), out).eval()
    torch.testing.assert_close(logits(loaded), logits(policy), rtol=0, atol=1e-5)


def lora_case(tmp_path: Path) -> tuple[Path, AdapterSection, InMemory]:
    adapter = AdapterSection(rank=3, alpha=4.0)
    base_dir = save_base(tmp_path / "base", "llama")
    return base_dir, adapter, adapted(tiny_model("llama"), adapter, base_dir)[1]


@pytest.mark.fault(26, "an adapter of size 0", becomes="refused")
def test_an_adapter_of_size_0_is_refused(tmp_path: Path) -> None:
    base_dir, adapter, trained = lora_case(tmp_path)
    name = "policy.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    trained.tensors[name] = torch.empty(0)
    policy = add_adapter(build_skeleton(base_dir), adapter, str(base_dir))
    with pytest.raises(CheckpointError) as error:
        check_adapter(policy, trained)
    assert str(error.value) == (
        f"the checkpoint holds {name} of shape (0,) instead of (3, 32) (1 such of 28 parameters); "
        "expected the parameters that model.path and the adapter section describe. "
        "Export with the settings the run was trained with."
    )


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    base_dir, _, trained = lora_case(tmp_path)
    with pytest.raises(CheckpointError, match=r"of shape \(3, 32\) instead of \(4, 32\) \(28 such"):
        export_merged(base_dir, AdapterSection(rank=4), trained, tmp_path / "merged")


def test_missing_and_unexpected_parameters_are_refused(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "llama")
    trained = randomly_trained(tiny_model("llama"))
    norm = trained.tensors.pop("policy.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"holds no policy.model.norm.weight \(1 such of 21"):
        export_full(base_dir, trained, tmp_path / "full")
    trained.tensors |= {"policy.model.norm.weight": norm, "policy.score.weight": norm}
    with pytest.raises(CheckpointError, match="holds policy.score.weight, which the model has not"):
        export_full(base_dir, trained, tmp_path / "full")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    base_dir, adapter, trained = lora_case(tmp_path)
    name = "policy.base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    trained.tensors[name][0, 0] = bad
    with pytest.raises(CheckpointError) as error:
        export_merged(base_dir, adapter, trained, tmp_path / "merged")
    assert str(error.value).startswith(
        "model.layers.1.self_attn.q_proj.weight is not finite as float32; expected finite weights. "
    )
    policy = add_adapter(build_skeleton(base_dir), adapter, str(base_dir))
    with pytest.raises(CheckpointError, match=f"{name} is not finite"):
        write_file(tmp_path / "adapter", adapter_weights(policy, trained, torch.float32))


def test_an_adapter_on_a_convolution_can_not_be_merged(tmp_path: Path) -> None:
    base_dir = save_base(tmp_path / "base", "lfm2")
    adapter = AdapterSection(rank=32, target_modules=["conv.conv"])
    with pytest.warns(UserWarning, match="Merging is not supported"):
        _, trained = adapted(tiny_model("lfm2"), adapter, base_dir)
    with (
        pytest.warns(UserWarning, match="Merging is not supported"),
        pytest.raises(ConfigError) as error,
    ):
        export_merged(base_dir, adapter, trained, tmp_path / "merged")
    assert str(error.value) == (
        "the adapter on base_model.model.model.layers.0.conv.conv is of kind Conv1d; expected "
        "adapters on linear layers, embeddings and stacked experts. "
        "Set export.merge=false, or leave it out of adapter.target_modules."
    )


def test_the_config_follows_the_weights() -> None:
    text = {"model_type": "t", "torch_dtype": "float16", "tie_word_embeddings": True}
    base = {"_name_or_path": "/home/me/base", "model_type": "m", "text_config": text}
    assert model_config(base, "bfloat16", breaks_ties=True) == {
        "model_type": "m",
        "text_config": {
            "model_type": "t",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        },
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    assert "tie_word_embeddings" not in model_config({"dtype": "float32"}, "float32", False)
