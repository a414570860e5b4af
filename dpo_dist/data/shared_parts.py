"""What pairs have in common: a prompt with several answers makes pairs that share it.

Shapes: N pairs of a split; a part is the prompt (0), the chosen (1) or the rejected answer (2).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_dist.reference.arrays import IntArray

Unit = tuple[tuple[int, ...], int]  # positions of pairs that stay together, and their tokens


@dataclass(frozen=True, eq=False)
class SharedParts:
    """Of every pair which parts it has, and how long they are.

    Parts with the same number are the same tokens; an answer counts with its prompt before it.
    """

    num_pairs: int  # N
    numbers_of: Callable[[IntArray], npt.NDArray[np.uint64]]  # (B,) indices of pairs to (B, 3)
    lengths_of: Callable[[IntArray], IntArray]  # the same of tokens

    @functools.cached_property
    def prompts(self) -> IntArray:
        """(N,) numbers of the prompts, 0, 1, 2, ... as they first occur."""
        return _numbered(self.numbers_of(np.arange(self.num_pairs))[:, 0])

    def by_prompt(self, pair_indices: IntArray) -> IntArray:
        """The same pairs, those of a prompt one after the other where its first one was."""
        return pair_indices[
            np.argsort(_numbered(self.numbers_of(pair_indices)[:, 0]), kind="stable")
        ]

    def tokens(self, pair_indices: IntArray) -> int:
        """Tokens of these pairs in one row, every prompt and every answer once."""
        # an answer that is the same as a prompt is none: their keys are of different lengths
        return _once(self.numbers_of(pair_indices), self.lengths_of(pair_indices))

    def answer_tokens(self, pair_indices: IntArray) -> int:
        """Those of the answers among `tokens`."""
        return _once(self.numbers_of(pair_indices)[:, 1:], self.lengths_of(pair_indices)[:, 1:])

    def together(self, pair_indices: IntArray, most_tokens: int) -> list[Unit]:
        """Divides the pairs into those that belong into one row since they share a prompt.

        A unit has at most `most_tokens`, but for a pair that is longer by itself. Units are in the
        order of their first pairs.
        """
        numbers, lengths = self.numbers_of(pair_indices), self.lengths_of(pair_indices)
        by_prompt: dict[int, list[int]] = {}
        for position, prompt in enumerate(numbers[:, 0].tolist()):
            by_prompt.setdefault(prompt, []).append(position)
        if len(by_prompt) == len(numbers):
            return alone(lengths.sum(axis=1))
        units: list[Unit] = []
        for positions in by_prompt.values():
            units += _divided(positions, numbers, lengths, most_tokens)
        return sorted(units)


def _once(numbers: npt.NDArray[np.uint64], lengths: IntArray) -> int:
    """The sum of the lengths, each number counted once."""
    _, first = np.unique(numbers, return_index=True)
    return int(lengths.ravel()[first].sum())


def _numbered(values: npt.NDArray[np.uint64]) -> IntArray:
    """0, 1, 2, ... for the distinct values in the order in which they first occur."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def alone(lengths: IntArray) -> list[Unit]:
    """Each pair by itself; lengths are (B,) tokens of the B pairs."""
    return [((position,), tokens) for position, tokens in enumerate(lengths.tolist())]


def _divided(
    positions: Sequence[int], numbers: npt.NDArray[np.uint64], lengths: IntArray, limit: int
) -> list[Unit]:
    """The pairs of a prompt, in their order, in units of at most `limit` tokens."""
    units: list[Unit] = []
    members: list[int] = []
    held: dict[int, int] = {}  # number of a part -> its tokens
    for position in positions:
        parts = dict(zip(numbers[position].tolist(), lengths[position].tolist(), strict=True))
        if members and sum((held | parts).values()) > limit:
            units.append((tuple(members), sum(held.values())))
            members, held = [], {}
        members.append(position)
        held |= parts
    return [*units, (tuple(members), sum(held.values()))]
