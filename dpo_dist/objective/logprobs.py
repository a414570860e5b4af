"""Log-probs of completion tokens from hidden states, without ever holding all the logits.

Shapes: C completion positions, D hidden, V vocabulary, R rows of one chunk (R <= C).

The logits of one chunk are made, used and dropped before those of the next; backward makes them
again. So the peak is one (R, V) buffer beside the gradients, whatever C is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS_BUDGET = 2**25  # logits of one chunk; 128 MiB of float32


def completion_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return `log softmax(f(hidden @ weight.T + bias))[target]` of every completion position.

    `f(x)` is `x * logit_scale`, then `softcap * tanh(x / softcap)` where a softcap is given.
    hidden is (C, D), weight (V, D), targets (C,) int64, bias (V,); the result is (C,) float32
    (float64 from float64 inputs). The softmax is taken in float32 whatever the dtype of the
    inputs. `chunk_size` is the rows of a chunk; by default as many as LOGITS_BUDGET allows.

    Gradients reach hidden, weight and bias; one that is not required costs nothing, so a frozen
    weight has no (V, D) buffer. The weight's gradient is summed over chunks in its own dtype.
    """
    assert hidden.shape[0] == targets.shape[0], (hidden.shape, targets.shape)
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    rows = chunk_size or max(1, LOGITS_BUDGET // weight.shape[0])
    return _CompletionLogps.apply(hidden, weight, targets, bias, logit_scale, softcap, rows)


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
    ) -> Tensor:
        # The weight stays an object, not a saved tensor: under ZeRO-3 its storage is freed after
        # the forward and gathered into a new one before the backward.
        ctx.weight, ctx.bias = weight, bias
        ctx.logit_scale, ctx.softcap, ctx.rows = logit_scale, softcap, rows
        logps = hidden.new_empty(hidden.shape[0], dtype=_softmax_dtype(hidden))
        log_normalisers = torch.empty_like(logps)
        for chunk in _chunks(hidden.shape[0], rows):
            logits = _logits(hidden[chunk], weight, bias, logit_scale, softcap)
            logps[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1)
            log_normalisers[chunk] = _logsumexp_(logits)
            del logits
        logps -= log_normalisers
        ctx.save_for_backward(hidden, targets, log_normalisers)
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_logps,) = grad_outputs
        hidden, targets, log_normalisers = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(log_normalisers[:0]).new_zeros(bias.shape) if needs_bias else None
        for chunk in _chunks(hidden.shape[0], ctx.rows):
            logits = _logits(hidden[chunk], weight, bias, ctx.logit_scale, ctx.softcap)
            slopes = None
            if ctx.softcap is not None:  # d capped / d uncapped, from the capped value
                slopes = (logits / ctx.softcap).square_().neg_().add_(1.0)
            grad = logits.sub_(log_normalisers[chunk, None]).exp_().neg_()
            grad[torch.arange(len(grad), device=grad.device), targets[chunk]] += 1.0
            grad *= grad_logps[chunk, None] * ctx.logit_scale
            if slopes is not None:
                grad *= slopes
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[chunk])
            del logits, grad, slopes
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None
