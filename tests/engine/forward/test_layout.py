"""The self-check at load: packed where it is right, padded where not, an error where neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.oracles.plain_forward import PACKED, PADDED
from support.tiny_models import WINDOW, tiny_model

from dpo_dist.engine.forward.layout_choice import (
    choose_layout,
    packed_fault,
    settle,
    synthetic_pairs,
)
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.errors import DPODistError

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]

REASONS = {
    "mamba": "it has layers of type linear_attention",
    "falcon_h1": "it has layers of type hybrid",
    "lfm2": "it has layers of type conv",
    "recurrent_gemma": "it has layers of type linear_attention",
    "bloom": "BloomForCausalLM has an attention of its own",
    "stablelm": "StableLmAttention did not hand the packed row on",
    "llama4": "it attends in chunks of 7 tokens",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_attention_models_are_packed(family: str, dtype: torch.dtype) -> None:
    scorer = PairScorer(tiny_model(family, dtype=dtype))
    layout, reason = choose_layout(scorer, CPU)
    assert (layout, reason) == ("packed", "it agrees with plain forwards and does not leak")


@pytest.mark.parametrize("family", PADDED)
def test_other_models_are_padded_and_the_reason_is_said(family: str) -> None:
    layout, reason = choose_layout(PairScorer(tiny_model(family)), CPU)
    assert (layout, reason) == ("padded", REASONS[family])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "lfm2", "recurrent_gemma", "llama4"])
def test_scoring_alone_tells_them_apart(family: str, dtype: torch.dtype) -> None:
    """A family that says nothing of its layers is found out all the same."""
    scorer = PairScorer(tiny_model(family, dtype=dtype))
    packed = pack_pairs(synthetic_pairs(scorer.policy.config))
    with torch.no_grad():
        plain = scorer(packed, "plain")
        fault = packed_fault(scorer, packed, plain, dtype)
    assert fault is not None
    assert "nats per token away from plain forwards" in fault or "move rejected by" in fault


def test_a_leak_too_small_for_the_comparison_is_found() -> None:
    """In bfloat16 the agreement is rough; what rejected must not see is checked much closer."""
    scorer = PairScorer(tiny_model("mamba", dtype=torch.bfloat16))
    packed = pack_pairs(synthetic_pairs(scorer.policy.config))
    with torch.no_grad():
        fault = packed_fault(scorer, packed, scorer(packed, "packed"), torch.bfloat16)
    assert fault is not None and fault.startswith("packed, other tokens in chosen move rejected by")


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_off_while_checking_and_the_mode_is_put_back(mode: bool) -> None:
    model = tiny_model("gpt2")  # its configuration drops a tenth of everything
    scorer = PairScorer(model).train(mode)
    assert choose_layout(scorer, CPU)[0] == "packed"
    assert scorer.training is mode and model.transformer.drop.training is mode


@pytest.mark.parametrize("mode", [True, False])
def test_a_scorer_takes_over_the_mode_of_its_policy(mode: bool) -> None:
    model = tiny_model("gpt2").train(mode)
    scorer = PairScorer(model)
    settle(scorer)
    assert scorer.training is mode and model.transformer.drop.training is mode


def test_one_call_settles_layout_and_attention_and_says_why() -> None:
    scorer = PairScorer(tiny_model("mamba"), layout="packed", backend="flash_attn")
    settled = settle(scorer)
    assert (scorer.layout, scorer.backend) == (settled.layout, settled.backend)
    assert str(settled) == (
        "layout: padded (it has layers of type linear_attention); attention: sdpa "
        "(variable-length kernels need a CUDA device, and this is cpu)"
    )
    asked = settle(PairScorer(tiny_model("llama")), layout="padded", attention="sdpa")
    assert str(asked) == "layout: padded (requested); attention: sdpa (requested)"


def test_unknown_head_is_an_error() -> None:
    model = tiny_model("llama")
    own_forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = own_forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(DPODistError) as caught:
        choose_layout(PairScorer(model), CPU)
    assert caught.value.found.startswith(
        "LlamaForCausalLM scored from its hidden states and output embedding is "
    )
    assert caught.value.found.endswith(" nats per token away from its own logits")
    assert caught.value.expected == "at most 1.0e-03 in torch.float32"
    assert caught.value.remedy == (
        "The model changes its logits in a way that dpo-dist does not know: use another one."
    )


def less_the_batchs_mean(output: torch.Tensor) -> torch.Tensor:
    return output - output.mean(dim=(0, 1), keepdim=True)


def for_40_tokens(output: torch.Tensor) -> torch.Tensor:
    kept = torch.arange(output[..., 0].numel()).view(output.shape[:2]) < 40
    return output * kept[..., None]


@pytest.mark.fault(
    40,
    "statistics over a micro-batch, and a capacity of it, inside the model",
    becomes="found at load and refused",
)
@pytest.mark.parametrize("change", [less_the_batchs_mean, for_40_tokens])
def test_fault_40_what_a_micro_batch_shares_is_found_at_load(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: change(output))
    with pytest.raises(DPODistError, match="nats per token away from its own logits"):
        settle(PairScorer(model))


def test_a_model_of_not_a_number_is_an_error() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(DPODistError, match="inf nats per token"):
        choose_layout(PairScorer(model), CPU)


def test_synthetic_prompts_exceed_a_small_window_and_repeat() -> None:
    config = tiny_model("mistral").config
    (prompt, chosen, _), _ = synthetic_pairs(config)
    assert len(prompt) > WINDOW and list(prompt[:12]) == list(prompt[12:24])
    text = [*prompt, *chosen]
    assert text[12:] == text[:-12]
    config.sliding_window = 300
    assert len(synthetic_pairs(config)[0][0]) > 400
    config.sliding_window = 4096
    assert len(synthetic_pairs(config)[0][0]) < 100
