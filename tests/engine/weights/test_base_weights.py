"""Names in the base files against names in the module, for every family we know."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import FAMILIES
from support.weights.trained_weights import save_base
from transformers import AutoModelForCausalLM

from dpo_dist.engine.weights.base_weights import open_base
from dpo_dist.errors import ModelFilesError


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_files_again(family: str, tmp_path: Path) -> None:
    base = open_base(save_base(tmp_path, family))
    stored = load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    covered = set()
    for group in base.groups:
        parameters = base.read_parameters(group)
        assert set(parameters) == set(group.parameters)
        for name, tensor in parameters.items():
            assert torch.equal(tensor, loaded[name]), name
        for name, tensor in base.to_tensors(group, parameters).items():
            assert torch.equal(tensor, stored[name]), name
            covered.add(name)
    assert covered == set(stored) and not base.unread


def test_fused_experts_are_one_group(tmp_path: Path) -> None:
    base = open_base(save_base(tmp_path, "mixtral"))
    (group,) = [g for g in base.groups if "model.layers.0.mlp.experts.gate_up_proj" in g.parameters]
    assert sorted(group.tensors) == sorted(
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert in range(4)
        for part in ("w1", "w3")
    )


def test_a_base_in_the_modules_own_names_needs_no_conversion(tmp_path: Path) -> None:
    """transformers can also save Mixtral as it runs it."""
    save_base(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_original_format=False)
    base = open_base(tmp_path)
    assert all(group.parameters == group.tensors for group in base.groups)


def test_files_of_the_inner_model_get_its_prefix(tmp_path: Path) -> None:
    """GPT-2's files on the hub say `h.0...` where the causal LM has `transformer.h.0...`, and
    hold the causal masks of old versions, which loading leaves aside."""
    save_base(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, path, metadata={"format": "pt"})
    base = open_base(tmp_path)
    names = {group.tensors[0]: group.parameters[0] for group in base.groups}
    assert names["h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight"
    assert names["lm_head.weight"] == "lm_head.weight"
    assert base.unread == ("h.0.attn.bias",)


def test_tied_parameters_are_known_by_all_their_names(tmp_path: Path) -> None:
    base = open_base(save_base(tmp_path, "llama_tied"))
    assert base.ties == (("model.embed_tokens.weight", "lm_head.weight"),)
    group = base.group_of("lm_head.weight")
    assert group is not None and group.tensors == ("model.embed_tokens.weight",)
    assert base.file_name_of("lm_head.weight") == "lm_head.weight"


def test_the_main_type_is_that_of_most_bytes(tmp_path: Path) -> None:
    path = save_base(tmp_path, "llama", torch.bfloat16) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    assert open_base(tmp_path).main_dtype == torch.bfloat16


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save_base(tmp_path, "llama") / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(31)}, path)
    with pytest.raises(ModelFilesError) as error:
        open_base(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: model.norm.weight (31,) would load as model.norm.weight (31,); expected "
        "model.norm.weight (32,), and the same tensors on the way back. "
        "This model cannot be exported under the names of its base folder."
    )


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    path = save_base(tmp_path, "mixtral") / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelFilesError, match="experts.0.w1.weight .* would load as error"):
        open_base(tmp_path)


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    config = save_base(tmp_path, "llama") / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ModelFilesError) as error:
        open_base(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds quantized weights (fp8); expected weights in float32, bfloat16 or "
        "float16. Set model.path to the original of the model; model.quantization=nf4 packs it "
        "while it is loaded."
    )


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (save_base(tmp_path, "llama") / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFilesError) as error:
        open_base(tmp_path)
    assert f"{tmp_path} has pickled weights only (pytorch_model.bin); expected safeten" in str(
        error.value
    )
    assert str(error.value).endswith("exports without this under export.merge=false.")
