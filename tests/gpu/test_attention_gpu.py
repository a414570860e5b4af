"""The variable-length kernels against the per-pair attention, on a CUDA device."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import pairs
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.forward.attention import Backend, PackedRow, packed_attention
from dpo_dist.engine.forward.backend_choice import choose_backend
from dpo_dist.engine.forward.layout_choice import choose_layout
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn"
)
KERNELS = [
    pytest.param("torch", id="torch"),
    pytest.param("flash_attn", id="flash_attn", marks=needs_flash_attn),
]
CUDA = torch.device("cuda")
LENGTHS = [(130, 33, 64), (1, 5, 1), (40, 200, 7)]  # prompt, chosen, rejected


def row(backend: Backend) -> PackedRow:
    ids = [([3] * p, [4] * c, [5] * r) for p, c, r in LENGTHS]
    return PackedRow.of(pack_pairs(ids, CUDA), backend)


def heads(num_query: int, num_key: int, value_size: int) -> list[Tensor]:
    torch.manual_seed(0)
    num_tokens = sum(map(sum, LENGTHS))
    shapes = ((num_query, 64), (num_key, 64), (num_key, value_size))
    return [
        torch.randn(1, number, num_tokens, width, device=CUDA, dtype=torch.bfloat16)
        for number, width in shapes
    ]


def attend(
    backend: Backend, tensors: list[Tensor], window: int | None, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients in float32."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    mask = None if window is None else torch.tensor(window)
    out, _ = packed_attention(nn.Module(), *leaves, mask, packed_row=row(backend), **options)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    return out.float(), tuple(grad.float() for grad in grads)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 16, 1000])
@pytest.mark.parametrize(
    ("num_query", "num_key", "value_size"), [(8, 8, 64), (8, 2, 64), (4, 4, 40)]
)
def test_kernels_equal_per_pair_attention(
    backend: Backend, window: int | None, num_query: int, num_key: int, value_size: int
) -> None:
    tensors = heads(num_query, num_key, value_size)
    exact, exact_grads = attend("sdpa", [tensor.float() for tensor in tensors], window, scaling=0.2)
    out, grads = attend(backend, tensors, window, scaling=0.2)
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@needs_flash_attn
def test_flash_attn_honors_the_soft_cap() -> None:
    tensors = heads(8, 2, 64)
    exact, exact_grads = attend("sdpa", [tensor.float() for tensor in tensors], 16, softcap=2.0)
    out, grads = attend("flash_attn", tensors, 16, softcap=2.0)
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gemma2", "gpt_oss"])
def test_models_are_packed_with_the_backend_chosen_for_them(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16).to(CUDA)
    backend, reason = choose_backend(model, "auto", CUDA, torch.bfloat16)
    if family == "gpt_oss":
        assert (backend, reason.split(",")[0]) == (
            "sdpa",
            "variable-length kernels have no attention sinks",
        )
    scorer = PairScorer(model, backend=backend)
    assert choose_layout(scorer, CUDA)[0] == "packed"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mamba"])
def test_float32_scores_equal_those_of_the_cpu(family: str) -> None:
    model = tiny_model(family)
    layout = "padded" if family == "mamba" else "packed"
    packed = pack_pairs(pairs())
    expected = score_pairs(PairScorer(model, layout=layout), packed)
    found = score_pairs(PairScorer(model.to(CUDA), layout=layout), packed.to(CUDA))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)
