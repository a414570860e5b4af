"""Attention over a packed row: every answer sees its prompt and itself, nothing else.

Shapes: T packed tokens, H query heads, K key-value heads, E head size.

For each group of the row, `prompt | first answer | second answer | ...`, there is a causal call
an answer, all with the mask aligned to the bottom right, so that no T x T mask exists:

    first    queries prompt | answer   keys and values prompt | answer
    others   queries answer            keys and values prompt | answer

The queries of all calls are the row itself, so a variable-length kernel takes them at once and
only keys and values are copied, a prompt once for each answer.

The function is registered with transformers under PACKED_ATTENTION; the row travels as a forward
keyword, `packed_row`. A layer's window comes from the mask interface and not from the
`sliding_window` keyword, because some families (qwen2_moe, phimoe) state it only there.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from dpo_dist.engine.distributed.sequence_parallel import Team
from dpo_dist.engine.forward.packing import PackedPairs, upload
from dpo_dist.engine.forward.padding import unpack

PACKED_ATTENTION = "dpo_dist_packed"

Backend = Literal["flash_attn", "torch", "sdpa"]


class PackedAttentionError(RuntimeError):
    """A model asks something of its attention that the packed row cannot give."""


@dataclass
class PackedRow:
    """Where the groups lie in a row, as the attention of every layer needs it; made per forward."""

    groups: list[list[int]]  # of each the tokens of its prompt, then of its answers
    backend: Backend
    device: torch.device
    team: Team | None = None  # the ranks that have a slice of the row each
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # shared by the layers
    query_ends: Tensor = field(init=False)  # (A + 1,) int32, in the row
    key_ends: Tensor = field(init=False)  # (A + 1,) int32, in keys with a prompt for each answer
    longest_query: int = field(init=False)
    longest_key: int = field(init=False)

    def __post_init__(self) -> None:
        query_lengths = self.query_lengths()
        key_lengths = [prompt + length for prompt, *answers in self.groups for length in answers]
        self.query_ends = _ends(query_lengths, self.device)
        self.key_ends = _ends(key_lengths, self.device)
        self.longest_query, self.longest_key = max(query_lengths), max(key_lengths)

    @classmethod
    def of(cls, packed: PackedPairs, backend: Backend, team: Team | None = None) -> PackedRow:
        return cls(packed.part_lengths, backend, packed.input_ids.device, team)

    def query_lengths(self) -> list[int]:
        """Queries of each call: those of a group's first answer begin with the prompt's."""
        return [n for prompt, first, *others in self.groups for n in (prompt + first, *others)]

    def mask(
        self, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """(num_queries, num_keys), 0 where the query sees the key, -inf elsewhere."""
        name = (num_queries, num_keys, window, dtype)
        if name not in self.masks:
            # The last query stands on the last key.
            positions = torch.arange(num_keys - num_queries, num_keys, device=self.device)
            distance = positions[:, None] - torch.arange(num_keys, device=self.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(num_queries, num_keys, dtype=dtype, device=self.device)
            self.masks[name] = mask.masked_fill_(hidden, float("-inf"))
        return self.masks[name]


@dataclass(frozen=True)
class Scoring:
    """How scores become weights in one layer."""

    scale: float
    window: int | None  # tokens a query sees, itself included
    softcap: float | None
    sinks: Tensor | None  # (H,) a score that takes weight and gives no value
    dropout: float


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E of the values)
    attention_mask: Tensor | None,  # what _window_of_mask returned
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_row: PackedRow | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of `packed_row`; returns ((1, T, H, E of the values), None).

    Where ranks share the row, T here and above is a rank's slice of it. Between two exchanges it
    has all tokens of some heads, and attends as one that has the row alone.
    Raises PackedAttentionError for a layer that is not plain causal attention over the row.
    """
    if packed_row is None:
        raise PackedAttentionError(f"{type(module).__name__} did not hand the packed row on")
    if position_bias is not None:
        raise PackedAttentionError(f"{type(module).__name__} adds a bias by position")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise PackedAttentionError(f"{type(module).__name__} is not causal")
    if query.shape[2] != key.shape[2]:
        raise PackedAttentionError(f"{type(module).__name__} attends to other than its own tokens")
    team = packed_row.team
    if team is not None:
        if query.shape[1] % team.size:
            raise PackedAttentionError(
                f"{type(module).__name__} has {query.shape[1]} heads for {team.size} ranks"
            )
        query, key, value = team.to_heads(query, key, value, sum(packed_row.query_lengths()))
        s_aux = None if s_aux is None else team.own_heads(s_aux)
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=None if attention_mask is None else int(attention_mask),
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    attend = _per_answer if packed_row.backend == "sdpa" else _varlen
    out = attend(query, key, value, packed_row, scoring)
    return (out if team is None else team.to_tokens(out)), None


def _window_of_mask(
    *args: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> Tensor | None:
    """Stands where transformers builds a dense mask: the window of the layer, None for all.

    A window is a tensor without dimensions on the CPU, since models expect a mask to be one.
    """
    if use_vmap:
        raise PackedAttentionError("the model changes the causal mask by a function of its own")
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _window_of_mask)


def _varlen(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scoring: Scoring) -> Tensor:
    """All calls at once in a variable-length kernel that aligns its mask to the bottom right."""
    size_of_values = value.shape[-1]
    if size_of_values < query.shape[-1]:  # the kernels know one head size only
        value = F.pad(value, (0, query.shape[-1] - size_of_values))
    q = query[0].transpose(0, 1).to(value.dtype)  # (T, H, E)
    k = repeat_prompts(key[0].transpose(0, 1).to(value.dtype), row)
    v = repeat_prompts(value[0].transpose(0, 1), row)
    ends = (row.query_ends, row.key_ends, row.longest_query, row.longest_key)
    kernel = kernel_of(row.backend)
    if row.backend == "flash_attn":
        out = kernel(
            *(q, k, v, *ends),
            dropout_p=scoring.dropout,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=(-1, -1) if scoring.window is None else (scoring.window - 1, 0),
            softcap=scoring.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    else:  # its backward asks torch itself whether to be deterministic
        groups = q.shape[1] // k.shape[1]
        grouped = {"enable_gqa": groups > 1} if _takes_groups(kernel) else {}
        if not grouped:
            k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        out = kernel(
            *(q, k, v, *ends),
            scale=scoring.scale,
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
            **grouped,
        )
    assert isinstance(out, Tensor)
    return out[None, :, :, :size_of_values].to(query.dtype)


def kernel_of(backend: Backend) -> Callable[..., Any]:
    """The variable-length kernel of "flash_attn" or "torch"; raises what its import raises."""
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def _takes_groups(kernel: Callable[..., Any]) -> bool:
    """Whether torch's kernel takes fewer key-value heads than query heads: not in torch 2.11."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def repeat_prompts(tokens: Tensor, row: PackedRow) -> Tensor:
    """(T, ...) of the row to `prompt | answer` of each answer in turn.

    By split and cat rather than by index: the backward is then a sum of slices in a fixed order.
    """
    return torch.cat(unpack(tokens, row.groups))


def _per_answer(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scoring: Scoring
) -> Tensor:
    """A call for each answer, on a dense block of it."""
    dtype = query.dtype
    if query.device.type == "cpu":
        # The fused CPU kernel's backward is six times slower in half precision than in float32.
        query, key, value = query.float(), key.float(), value.float()
    sizes = row.query_lengths()
    calls = zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
    outs: list[Tensor] = []
    for num_prompt, _, *others in row.groups:
        queries, first_keys, first_values = next(calls)
        outs.append(_block(queries, first_keys, first_values, row, scoring))
        for queries, keys, values in itertools.islice(calls, len(others)):
            seen_keys = torch.cat((first_keys[:, :, :num_prompt], keys), 2)
            seen_values = torch.cat((first_values[:, :, :num_prompt], values), 2)
            outs.append(_block(queries, seen_keys, seen_values, row, scoring))
    return torch.cat([out.transpose(1, 2) for out in outs], 1).to(dtype)


def _block(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scoring: Scoring) -> Tensor:
    """Causal attention whose last query stands on the last key: (1, H, queries, E)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = scoring.window if scoring.window and scoring.window < num_keys else None
    if scoring.softcap is not None or scoring.sinks is not None:
        mask = row.mask(num_queries, num_keys, window, torch.float32)
        return _explicit_softmax(query, key, value, mask, scoring)
    plain = window is None and num_queries == num_keys
    sees_all = window is None and num_queries == 1
    mask = None if plain or sees_all else row.mask(num_queries, num_keys, window, query.dtype)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and mask is not None:
        # The CUDA kernel that takes a mask does not take grouped heads.
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=scoring.dropout,
        is_causal=plain,
        scale=scoring.scale,
        enable_gqa=grouped,
    )


def _explicit_softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """Soft caps and sinks, which no fused kernel takes; holds (H, queries, keys) floats."""
    _, num_heads, num_queries, _ = query.shape
    groups = num_heads // key.shape[1]
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)  # (1, K, groups * queries, E)
    scores = (grouped @ key.transpose(2, 3)).float() * scoring.scale
    scores = scores.unflatten(2, (groups, num_queries)).flatten(1, 2)  # (1, H, queries, keys)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view(1, -1, 1, 1).expand(1, num_heads, num_queries, 1)
        weights = torch.cat((scores, sinks), 3).softmax(3)[..., :-1]
    else:
        weights = scores.softmax(3)
    weights = F.dropout(weights, scoring.dropout).to(value.dtype)
    weights = weights.unflatten(1, (-1, groups)).flatten(2, 3)  # (1, K, groups * queries, keys)
    return (weights @ value).unflatten(2, (groups, num_queries)).flatten(1, 2)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return upload(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), device)
