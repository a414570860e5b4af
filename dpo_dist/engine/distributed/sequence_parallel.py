"""One row of tokens on several ranks: each has a slice of the tokens, or some heads of them all.

Everything but attention works on one token at a time, so a rank computes it on its slice. Around
attention the ranks exchange: what each has of all heads becomes what it has of all tokens, and
back. Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv:2309.14509).

Shapes: N ranks of a team, T tokens of a row, t = ceil(T / N) of a slice, H query heads, K
key-value heads, E and V sizes of a key's and of a value's head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dpo_dist.engine.distributed.collectives import TIMEOUT


@dataclass(frozen=True)
class Slice:
    """The part of `count` things that is one rank's; slices are as long as each other.

    The last ones reach beyond the end, where `take` repeats the last thing.
    """

    start: int
    length: int
    count: int

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor whose dimension `dim` has `count` entries."""
        places = torch.arange(self.start, self.start + self.length, device=tensor.device)
        return tensor.index_select(dim, places.clamp(max=self.count - 1))

    def is_there(self, device: torch.device) -> Tensor:
        """(length,) whether an entry is one of the `count`."""
        return torch.arange(self.start, self.start + self.length, device=device) < self.count


@dataclass(frozen=True)
class Team:
    """The ranks that share a row, and this one's place among them."""

    size: int  # N
    rank: int
    handle: Any  # torch's process group

    def slice_of(self, count: int) -> Slice:
        """Which of `count` things are this rank's."""
        length = -(-count // self.size)
        return Slice(self.rank * length, length, count)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the team, on each of its ranks.

        A gradient reaches a rank's own part as it is: what all ranks compute from the sum is one
        loss, and the gradients of its parts are added up with those of all other ranks.
        """
        apply: Any = _Sum.apply  # pyright: ignore
        return apply(partial, self.handle)

    def to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A slice of all heads to some heads of all tokens, of which there are `num_tokens`.

        (1, H, t, E), (1, K, t, E), (1, K, t, V) become (1, H / N, T, E) and the key-value heads
        that these attend to; N must divide H. Where it does not divide K, heads are repeated until
        it does. All three travel in one exchange.
        """
        repeats = self.size // math.gcd(self.size, key.shape[1])
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        tensors = (query, key, value)
        # (N, t, heads of a rank, size) of each
        parts = [each[0].unflatten(0, (self.size, -1)).transpose(1, 2) for each in tensors]
        shapes = [part.shape[2:] for part in parts]
        sent = torch.cat([part.flatten(2) for part in parts], 2)
        row = self._exchange(sent).flatten(0, 1)[:num_tokens]
        pieces = row.split([math.prod(shape) for shape in shapes], 1)
        q, k, v = (
            piece.unflatten(1, shape).transpose(0, 1)[None].to(each.dtype)
            for piece, shape, each in zip(pieces, shapes, tensors, strict=True)
        )
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """(1, T, H / N, V) of some heads to (1, t, H, V) of a slice; zeros beyond the end."""
        _, num_tokens, num_heads, _ = out.shape
        length = self.slice_of(num_tokens).length
        row = F.pad(out[0].flatten(1), (0, 0, 0, self.size * length - num_tokens))
        of_heads = self._exchange(row.unflatten(0, (self.size, length)))  # (N, t, heads of a rank)
        return of_heads.transpose(0, 1).unflatten(2, (num_heads, -1)).flatten(1, 2)[None]

    def own_heads(self, of_heads: Tensor) -> Tensor:
        """This rank's part of (H,) numbers, one a head."""
        return of_heads.chunk(self.size)[self.rank]

    def _exchange(self, parts: Tensor) -> Tensor:
        """(N, ...): part i goes to rank i, and what comes from rank i is part i of the result."""
        apply: Any = _Exchange.apply  # pyright: ignore
        return apply(parts, self.handle)


def join_team(size: int) -> Team | None:
    """This rank's team of `size` consecutive ranks, None where each stands alone.

    All ranks call together; their number must be a multiple of `size`.
    """
    if size == 1:
        return None
    rank, own = dist.get_rank(), None
    for first in range(0, dist.get_world_size(), size):
        # every rank takes part in making every process group
        handle = dist.new_group(list(range(first, first + size)), timeout=TIMEOUT)
        if first <= rank < first + size:
            own = Team(size, rank - first, handle)
    return own


class _Exchange(torch.autograd.Function):
    """An all-to-all; its gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, handle: Any) -> Tensor:
        ctx.handle = handle
        return _all_to_all(parts, handle)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.handle), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, handle: Any) -> Tensor:
        whole = partial.clone()
        dist.all_reduce(whole, group=handle)
        return whole

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return grad, None


def _all_to_all(parts: Tensor, handle: Any) -> Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=handle)
    return received
