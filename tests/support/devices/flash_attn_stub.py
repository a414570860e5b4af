"""flash-attn's one function that is called, with its signature and what it refuses; no numbers.

From flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of flash-attn 2.8.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """(tokens of q, heads of q, size): of the right shape, with a gradient to all three."""
    assert {t.dtype for t in (q, k, v)} in ({torch.bfloat16}, {torch.float16})
    assert all(t.stride(-1) == 1 for t in (q, k, v)), "the last dimension must be contiguous"
    (_, num_heads, size), (num_keys, num_key_heads, _) = q.shape, k.shape
    assert k.shape == v.shape == (num_keys, num_key_heads, size)
    assert size <= 256 and size % 8 == 0 and num_heads % num_key_heads == 0
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype == torch.int32 and ends.device == q.device and ends.is_contiguous()
    assert all(type(n) is int for n in (max_seqlen_q, max_seqlen_k, *window_size))
    assert type(softmax_scale) is float and causal and type(softcap) is float
    assert 0 <= dropout_p < 1 and not (softcap > 0 and dropout_p > 0)
    assert deterministic in (True, False)
    assert alibi_slopes is None and not return_attn_probs and block_table is None
    of_keys = torch.cat((k.mean((0, 1)), v.mean((0, 1)))).sum()
    return q * of_keys * softmax_scale


def installed() -> AbstractContextManager[Any]:
    """`import flash_attn` finds the function, inside the context."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore
    return mock.patch.dict(sys.modules, {"flash_attn": module})
