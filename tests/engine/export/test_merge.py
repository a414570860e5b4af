"""The merge formulas against peft's layers and against the adapter's own forward."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_dist.engine.export.merge import merge_expert_lora_, merge_lora_

RANK, ALPHA = 4, 6.0


class Small(nn.Module):
    """One layer of each kind that can have an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)
        self.conv1d = Conv1D(10, 6)  # 6 inputs, 10 outputs, stored (6, 10)
        self.embedding = nn.Embedding(12, 5)


class Experts(nn.Module):
    """A stack of expert weights, (E, O, I), or (E, I, O) as gpt_oss has it."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn(*((3, 6, 10) if is_transposed else (3, 10, 6))))


class Wrapped(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)


def adapted(model: nn.Module, **settings: Any) -> Any:
    """The model with a random adapter: peft starts B at zero, which would merge to nothing."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **settings)  # pyright: ignore
    policy = peft.get_peft_model(model, config)  # pyright: ignore
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.uniform_(0.2, 1.0)
    return policy


def parts(layer: Any, kind: str = "lora") -> dict[str, Any]:
    """Copies of what merge_lora_ takes beside the weight."""
    if kind == "embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {
        "lora_a": a.detach().clone(),
        "lora_b": b.detach().clone(),
        "scaling": layer.scaling["default"],
    }


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("target", ["linear", "conv1d", "embedding"])
def test_a_layer_merges_as_peft_does(target: str, use_rslora: bool, use_dora: bool) -> None:
    policy = adapted(
        Small(), target_modules=[target], use_rslora=use_rslora, use_dora=use_dora,
        fan_in_fan_out=target == "conv1d",
    )  # fmt: skip
    layer = getattr(policy.base_model.model, target)
    assert isinstance(layer, LoraLayer)
    weight = layer.get_base_layer().weight.detach().clone()
    before = weight.clone()
    settings = parts(layer, target)
    assert settings["scaling"] == pytest.approx(ALPHA / (RANK**0.5 if use_rslora else RANK))
    if use_dora:
        settings["magnitude"] = layer.lora_magnitude_vector["default"].weight.detach().clone()
    merge_lora_(weight, transposed=target != "linear", **settings)
    layer.merge()
    torch.testing.assert_close(weight, layer.get_base_layer().weight.data, rtol=0, atol=1e-6)
    assert (weight - before).abs().max() > 0.1


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_merge_as_peft_does(is_transposed: bool) -> None:
    policy = adapted(Wrapped(is_transposed), target_modules=[], target_parameters=["stack"])
    layer = policy.base_model.model.experts
    weight = layer.get_param().detach().clone()
    before = weight.clone()
    merge_expert_lora_(weight, transposed=is_transposed, **parts(layer))
    layer.merge()
    torch.testing.assert_close(weight, layer.get_param().data, rtol=0, atol=1e-6)
    assert ((weight - before).abs().amax(dim=(1, 2)) > 0.1).all(), "an expert was left out"


def test_the_merged_layer_computes_what_the_adapter_does() -> None:
    policy = adapted(Small(), target_modules=["linear"], use_dora=True)
    layer = policy.base_model.model.linear
    x = torch.randn(3, 6)
    expected = layer(x)
    weight = layer.get_base_layer().weight.detach().clone()
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    merge_lora_(weight, magnitude=magnitude, **parts(layer))
    got = nn.functional.linear(x, weight, layer.get_base_layer().bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_factors_of_another_shape_are_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError, match=r"\[6, 10\]"):
        merge_lora_(torch.zeros(6, 10), torch.zeros(2, 6), torch.zeros(10, 2), 1.0)
