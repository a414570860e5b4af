"""Chunked log-probs: equal to plain log_softmax in value and gradient, and small in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.live_bytes import LiveBytes
from dpo_dist.objective.logprobs import LOGITS_BUDGET, completion_terms
from dpo_dist.planning.setup import LOGITS_PER_CHUNK

C, D, V = 11, 6, 23

VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"logit_scale": 0.25},
    {"softcap": 1.5},
    {"bias": True, "logit_scale": 3.0, "softcap": 2.0},
]


def plain_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def inputs(
    dtype: torch.dtype, *, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(C, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (C,), generator=generator)
    targets[1] = targets[0]  # two positions that push the same row of the weight
    shift = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, shift


def completion_logps(*args: Tensor | None, **options: Any) -> Tensor:
    logps, _ = completion_terms(*args, **options)  # pyright: ignore[reportArgumentType]
    return logps


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, C - 1, C, C + 5, None])
def test_value_and_gradients_equal_plain_autograd(
    variant: dict[str, Any], chunk_size: int | None
) -> None:
    options = {key: value for key, value in variant.items() if key != "bias"}
    hidden, weight, targets, bias = inputs(torch.float64, bias="bias" in variant)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    grad_logps = torch.linspace(-1.0, 2.0, C, dtype=torch.float64)

    ours = completion_logps(hidden, weight, targets, bias=bias, chunk_size=chunk_size, **options)
    plain = plain_logps(hidden, weight, targets, bias=bias, **options)

    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for our_grad, plain_grad in zip(
        torch.autograd.grad(ours, leaves, grad_logps),
        torch.autograd.grad(plain, leaves, grad_logps),
        strict=True,
    ):
        torch.testing.assert_close(our_grad, plain_grad, rtol=1e-11, atol=1e-12)


def test_softmax_is_float32_for_bfloat16_inputs() -> None:
    hidden, weight, targets, _ = inputs(torch.bfloat16)
    hidden.requires_grad_()
    logps = completion_logps(hidden, weight, targets, chunk_size=4)
    rounded_logits = F.linear(hidden, weight).float()
    expected = torch.log_softmax(rounded_logits, -1).gather(1, targets[:, None]).squeeze(1)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets, _ = inputs(torch.float32)
    hidden = (hidden * 1e4).requires_grad_()
    logps = completion_logps(hidden, weight, targets)
    torch.testing.assert_close(logps, plain_logps(hidden, weight, targets))
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_frozen_weight_gets_no_gradient_and_hidden_still_does() -> None:
    hidden, weight, targets, _ = inputs(torch.float32)
    hidden.requires_grad_()
    completion_logps(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_weight_swapped_between_forward_and_backward_is_read_again() -> None:
    """What ZeRO-3 does: the parameter's storage is freed and gathered into another tensor."""
    hidden, weight, targets, _ = inputs(torch.float32)
    parameter = torch.nn.Parameter(weight.clone())
    hidden.requires_grad_()
    logps = completion_logps(hidden, parameter, targets, chunk_size=4)
    parameter.data = torch.empty(0)
    parameter.data = weight.clone()
    logps.sum().backward()
    expected = torch.autograd.grad(plain_logps(hidden, parameter, targets).sum(), parameter)[0]
    torch.testing.assert_close(parameter.grad, expected)


def peak_bytes(logps_of: Any, *, frozen: bool) -> int:
    """Peak of what forward + backward makes beside its inputs, for 512 positions x 4096 tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 8, generator=generator).requires_grad_()
    weight = torch.randn(4096, 8, generator=generator).requires_grad_(not frozen)
    targets = torch.randint(4096, (512,), generator=generator)
    with LiveBytes() as counted:
        logps_of(hidden, weight, targets).sum().backward()
    return counted.peak


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_is_one_chunk_of_logits(softcap: float | None) -> None:
    logits_bytes = 512 * 4096 * 4
    weight_bytes = 4096 * 8 * 4
    chunk_bytes = logits_bytes // 16  # 32 of 512 positions at a time

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return completion_logps(hidden, weight, targets, softcap=softcap, chunk_size=32)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return plain_logps(hidden, weight, targets, softcap=softcap)

    assert peak_bytes(plain, frozen=True) >= 2 * logits_bytes  # the counter sees plain autograd
    chunk_buffers = 1 if softcap is None else 2
    small = 64 * 1024  # vectors of C, the gradient of hidden
    assert peak_bytes(chunked, frozen=True) <= chunk_buffers * chunk_bytes + small
    assert peak_bytes(chunked, frozen=False) <= chunk_buffers * chunk_bytes + weight_bytes + small


def test_default_chunk_follows_from_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the budget, half the peak: the default chunk is made from the budget and from V."""
    assert LOGITS_BUDGET >= 2**20
    assert LOGITS_BUDGET == LOGITS_PER_CHUNK, "the planner counts with it"
    peaks = []
    for budget in (64 * 4096, 32 * 4096):
        monkeypatch.setattr("dpo_dist.objective.logprobs.LOGITS_BUDGET", budget)
        peaks.append(peak_bytes(completion_logps, frozen=True))
    assert peaks[0] - peaks[1] == pytest.approx(32 * 4096 * 4, rel=0.05)


@pytest.mark.parametrize("coherent", [False, True])
def test_truth_03_the_heads_gradient_does_not_depend_on_the_chunks(coherent: bool) -> None:
    """In bfloat16; coherent: every row pulls the same way, so a sum in bfloat16 stops growing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 8, generator=generator).bfloat16()
    hidden = hidden[:1].expand(512, -1).contiguous() if coherent else hidden
    targets = torch.randint(16, (512,), generator=generator)
    targets = targets[:1].expand(512) if coherent else targets
    gradients = []
    for chunk_size in (512, 2):
        weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
        weight.requires_grad_()
        logps, _ = completion_terms(hidden, weight, targets, chunk_size=chunk_size)
        logps.sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
        gradients.append(weight.grad.double())
    one, many = gradients
    assert float((many - one).norm() / one.norm()) < 0.002
