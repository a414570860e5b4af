"""Log-probs of completion tokens from hidden states, without ever holding all the logits.

Shapes: C completion positions, D hidden, V vocabulary, R rows of one chunk (R <= C).

The logits of one chunk are made, used and overwritten by those of the next; backward makes them
again. So the peak is one (R, V) buffer beside the gradients, whatever C is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_BUDGET = 2**25  # logits of one chunk; 128 MiB of float32


def completion_terms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    sum_sq: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return `log softmax(f(hidden @ weight.T + bias))[target]` of every completion position.

    `f(x)` is `x * logit_scale`, then `softcap * tanh(x / softcap)` where a softcap is given.
    hidden is (C, D), weight (V, D), targets (C,) int64, bias (V,); the result is (C,) float32
    (float64 from float64 inputs). The softmax is taken in float32 whatever the dtype of the
    inputs. `chunk_size` is R; by default as many rows as LOGITS_BUDGET allows.

    Gradients reach hidden, weight and bias; one that is not required costs nothing, so a frozen
    weight has no (V, D) buffer. The weight's gradient is summed over chunks in float32 at least.

    With `sum_sq` the second result is (C,) `log sum_v p(v)^2` of the same distributions, without
    gradient; else None.
    """
    assert hidden.shape[0] == targets.shape[0], (hidden.shape, targets.shape)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    rows = chunk_size or max(1, LOGITS_BUDGET // weight.shape[0])
    apply: Any = _CompletionLogps.apply  # pyright: ignore
    terms = apply(hidden, weight, targets, bias, logit_scale, softcap, rows, sum_sq)
    return cast(tuple[Tensor, Tensor | None], terms)


class _CompletionLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        rows: int,
        sum_sq: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # The weight stays an object, not a saved tensor: under ZeRO-3 its storage is freed after
        # the forward and gathered into a new one before the backward.
        ctx.weight, ctx.bias = weight, bias
        ctx.logit_scale, ctx.softcap, ctx.rows = logit_scale, softcap, rows
        buffer = _chunk_buffer(hidden, weight, rows)
        logps = buffer.new_empty(hidden.shape[0])
        log_normalizers = torch.empty_like(logps)
        log_sum_sq = torch.empty_like(logps) if sum_sq else None
        for chunk in _chunks(hidden.shape[0], rows):
            logits = _logits(buffer, hidden[chunk], weight, bias, logit_scale, softcap)
            logps[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1)
            log_normalizers[chunk] = _logsumexp_(logits)
            if log_sum_sq is not None:
                log_sum_sq[chunk] = _log_sum_sq_(logits)
        ctx.save_for_backward(hidden, targets, log_normalizers)
        if log_sum_sq is not None:
            ctx.mark_non_differentiable(log_sum_sq)
        return logps.sub_(log_normalizers), log_sum_sq

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logps, *_ = grad_outputs
        hidden, targets, log_normalizers = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # in bfloat16 a sum over hundreds of chunks would lose percents of a coherent gradient
        grad_weight = torch.zeros_like(weight, dtype=grad_logps.dtype) if needs_weight else None
        grad_bias = grad_logps.new_zeros(bias.shape) if needs_bias else None
        buffer = _chunk_buffer(hidden, weight, ctx.rows)
        for chunk in _chunks(hidden.shape[0], ctx.rows):
            logits = _logits(buffer, hidden[chunk], weight, bias, ctx.logit_scale, ctx.softcap)
            grad = _grad_logits_(
                logits, targets[chunk], log_normalizers[chunk], grad_logps[chunk], ctx.softcap
            )
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0), alpha=ctx.logit_scale)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[chunk]).mul_(ctx.logit_scale)
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[chunk], alpha=ctx.logit_scale)
            elif grad_weight is not None:
                grad_weight.add_(torch.mm(grad.t(), hidden[chunk]), alpha=ctx.logit_scale)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


def _chunks(num_rows: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _chunk_buffer(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """One (R, V) buffer for all chunks: fresh pages for each would cost more than the softmax."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((min(rows, hidden.shape[0]), weight.shape[0]), dtype=dtype)


def _logits(
    buffer: Tensor,  # (R, V), overwritten
    hidden: Tensor,  # (rows of this chunk, D)
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    logits = buffer[: hidden.shape[0]]
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(torch.mm(hidden, weight.t()))
    if bias is not None:
        logits += bias
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _logsumexp_(logits: Tensor) -> Tensor:
    """(rows,) log of the sum of exponentials; `logits` becomes probabilities times a factor."""
    largest = logits.amax(1, keepdim=True)
    return logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))


def _log_sum_sq_(exponentials: Tensor) -> Tensor:
    """(rows,) log sum_v p(v)^2 of what `_logsumexp_` leaves behind, which is destroyed."""
    log_sums = exponentials.sum(1).log_()
    return exponentials.square_().sum(1).log_().sub_(log_sums, alpha=2)


def _grad_logits_(
    logits: Tensor,
    targets: Tensor,
    log_normalizers: Tensor,
    grad_logps: Tensor,
    softcap: float | None,
) -> Tensor:
    """Gradient of the log-probs by the scaled logits before the cap; `logits` is destroyed.

    `d log p[target] / d logit = [is target] - p`, times the slope of the cap, `1 - (y / cap)^2`.
    """
    slopes = None
    if softcap is not None:
        slopes = (logits / softcap).square_().neg_().add_(1.0)
    grad = logits.sub_(log_normalizers[:, None]).exp_().neg_()
    grad.scatter_add_(1, targets[:, None], torch.ones_like(grad[:, :1]))
    grad *= grad_logps[:, None]
    return grad if slopes is None else grad.mul_(slopes)
