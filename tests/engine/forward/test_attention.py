"""Attention over a packed row against a dense softmax with every mask written out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from dpo_dist.engine.forward.attention import (
    PACKED_ATTENTION,
    PackedAttentionError,
    PackedRow,
    packed_attention,
    repeat_prompts,
)
from dpo_dist.engine.forward.backend_choice import choose_backend, model_obstacle
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.errors import ConfigError

LENGTHS = [(6, 3, 4), (1, 5, 1), (3, 1, 7)]  # prompt, chosen, rejected
NUM_TOKENS = sum(map(sum, LENGTHS))
CPU = torch.device("cpu")


def row(lengths: list[tuple[int, int, int]] = LENGTHS) -> PackedRow:
    pairs = [([3] * p, [4] * c, [5] * r) for p, c, r in lengths]
    return PackedRow.of(pack_pairs(pairs), "sdpa")


def visible(window: int | None) -> Tensor:
    """(T, T): which key each query sees, token by token."""
    tokens = [
        (pair, part, position)
        for pair, (p, c, r) in enumerate(LENGTHS)
        for part, start, length in (("prompt", 0, p), ("chosen", p, c), ("rejected", p, r))
        for position in range(start, start + length)
    ]
    seen = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for query, (pair, part, position) in enumerate(tokens):
        for key, (key_pair, key_part, key_position) in enumerate(tokens):
            near = window is None or position - key_position < window
            same_side = key_part in ("prompt", part)
            seen[query, key] = pair == key_pair and same_side and near and key_position <= position
    return seen


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(window), float("-inf"))
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(1, -1, NUM_TOKENS, 1)), 3)
    weights = scores.softmax(3)[..., :NUM_TOKENS]
    return (weights @ value).transpose(1, 2)


def heads(num_query: int, num_key: int, size: int = 8, value_size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_query, size), (num_key, size), (num_key, value_size))
    return [
        torch.randn(1, number, NUM_TOKENS, width, generator=generator).requires_grad_()
        for number, width in shapes
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window longer than all": {"window": 100},
    "softcap": {"softcap": 0.4},
    "sinks": {"s_aux": True},
    "all": {"window": 3, "softcap": 0.4, "s_aux": True, "scaling": 0.7},
}


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_dense_attention_in_value_and_gradient(variant: str, num_key_heads: int) -> None:
    options = dict(VARIANTS[variant])
    leaves = heads(4, num_key_heads)
    if "s_aux" in options:
        options["s_aux"] = torch.randn(4, generator=torch.Generator().manual_seed(1))
        leaves.append(options["s_aux"].requires_grad_())
    expected = dense(*leaves[:3], **options)
    window = options.pop("window", None)
    mask = None if window is None else torch.tensor(window)
    out, _ = packed_attention(nn.Module(), *leaves[:3], mask, packed_row=row(), **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_values_may_have_another_head_size() -> None:
    leaves = heads(4, 2, size=8, value_size=5)
    out, _ = packed_attention(nn.Module(), *leaves, None, packed_row=row())
    torch.testing.assert_close(out, dense(*leaves), rtol=1e-5, atol=1e-5)


def test_half_precision_comes_back_as_it_went_in() -> None:
    leaves = [leaf.detach().bfloat16() for leaf in heads(4, 2)]
    out, _ = packed_attention(nn.Module(), *leaves, None, packed_row=row())
    assert out.dtype == torch.bfloat16
    expected = dense(*(leaf.float() for leaf in leaves))
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_ends_of_the_variable_length_call_describe_the_same_attention() -> None:
    """What the GPU kernels are handed, worked through one call at a time."""
    query, key, value = (leaf.detach() for leaf in heads(4, 4))
    packed_row = row()
    keys = repeat_prompts(key[0].transpose(0, 1), packed_row)
    values = repeat_prompts(value[0].transpose(0, 1), packed_row)
    query_ends, key_ends = packed_row.query_ends.tolist(), packed_row.key_ends.tolist()
    assert query_ends[-1] == NUM_TOKENS and key_ends[-1] == len(keys)
    outs = []
    for call in range(2 * len(LENGTHS)):
        q = query[0].transpose(0, 1)[query_ends[call] : query_ends[call + 1]]
        k, v = (kv[key_ends[call] : key_ends[call + 1]] for kv in (keys, values))
        assert len(q) <= packed_row.longest_query and len(k) <= packed_row.longest_key
        scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(2)
        outs.append(torch.einsum("hqk,khe->qhe", weights, v))
    torch.testing.assert_close(torch.cat(outs)[None], dense(query, key, value))


def test_dropout_is_applied_and_only_when_asked() -> None:
    leaves = heads(2, 2)
    still, again = (
        packed_attention(nn.Module(), *leaves, None, packed_row=row())[0] for _ in range(2)
    )
    dropped, _ = packed_attention(nn.Module(), *leaves, None, dropout=0.5, packed_row=row())
    assert still.equal(again) and not still.allclose(dropped)


def test_masks_are_made_once_for_all_layers() -> None:
    packed_row = row()
    for _ in range(3):
        packed_attention(nn.Module(), *heads(2, 2), None, packed_row=packed_row)
    assert len(packed_row.masks) == 2  # the second pair's one rejected token sees all keys


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"packed_row": None}, "did not hand the packed row on"),
        ({"position_bias": torch.zeros(1)}, "adds a bias by position"),
        ({"is_causal": False}, "is not causal"),
    ],
)
def test_what_a_packed_row_cannot_give_is_said(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(PackedAttentionError, match=f"Module {message}"):
        packed_attention(nn.Module(), *heads(2, 2), None, **{"packed_row": row(), **keywords})


def test_attention_to_other_tokens_is_refused() -> None:
    query, key, value = heads(2, 2)
    with pytest.raises(PackedAttentionError, match="attends to other than its own tokens"):
        packed_attention(nn.Module(), query, key[:, :, 1:], value[:, :, 1:], None, packed_row=row())


def test_registered_mask_is_the_window_and_never_dense() -> None:
    mask_of = AttentionMaskInterface()[PACKED_ATTENTION]
    shape: dict[str, Any] = {"batch_size": 1, "q_length": 9, "kv_length": 9}
    assert mask_of(**shape, mask_function=causal_mask_function) is None
    assert mask_of(**shape, mask_function=causal_mask_function, local_size=4).tolist() == 4
    with pytest.raises(PackedAttentionError, match="changes the causal mask"):
        mask_of(**shape, mask_function=causal_mask_function, use_vmap=True)
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention


def test_backend_on_cpu_is_sdpa_with_the_reason() -> None:
    backend, reason = choose_backend(tiny_model("llama"), "auto", CPU, torch.float32)
    assert backend == "sdpa"
    assert reason == "variable-length kernels need a CUDA device, and this is cpu"
    assert choose_backend(tiny_model("llama"), "sdpa", CPU, torch.float32) == ("sdpa", "requested")


@pytest.mark.parametrize("requested", ["torch", "flash_attn"])
def test_requested_backend_that_cannot_run_is_refused(requested: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_backend(tiny_model("llama"), requested, CPU, torch.float32)
    assert str(caught.value) == (
        f"model.attention is {requested}, but variable-length kernels need a CUDA device, and this "
        "is cpu; expected a backend that can run this model here: auto, sdpa. "
        "Set model.attention to one of them."
    )


@pytest.mark.parametrize(
    ("family", "settings", "torch_obstacle", "flash_obstacle"),
    [
        ("llama", {}, None, None),
        ("mistral", {}, None, None),
        ("gpt_oss", {}, "have no attention sinks", "have no attention sinks"),
        ("gemma2", {}, "no soft cap, and the model caps its scores at 0.5", None),
        ("gemma2", {"attention_dropout": 0.1}, "no soft cap", r"soft cap \(0.5\) .* \(0.1\)"),
        ("llama", {"attention_dropout": 0.1}, "drops 0.1 of its attention", None),
        ("gpt2", {"attn_dropout": 0.1}, "drops 0.1 of its attention", None),
        ("llama", {"head_dim": 512}, "256, not 512", "256, not 512"),
        ("llama", {"head_dim": 12}, "256, not 12", "256, not 12"),
        ("llama", {"qk_head_dim": 320, "head_dim": 64}, "256, not 320", "256, not 320"),
    ],
)
def test_backend_that_would_not_honor_the_model_is_passed_over(
    family: str, settings: dict[str, Any], torch_obstacle: str | None, flash_obstacle: str | None
) -> None:
    model = tiny_model(family)
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            if hasattr(module, name):
                value = settings.get(name, 0.0)
                is_module = isinstance(getattr(module, name), nn.Module)
                setattr(module, name, nn.Dropout(value) if is_module else value)
    for name in settings.keys() - {"attention_dropout", "attn_dropout"}:
        setattr(model.config, name, settings[name])
    for backend, expected in (("torch", torch_obstacle), ("flash_attn", flash_obstacle)):
        obstacle = model_obstacle(backend, model)
        assert (obstacle is None) == (expected is None), obstacle
        assert expected is None or re.search(expected, obstacle or "")
    assert model_obstacle("sdpa", model) is None
