"""Rows of a reference store in memory, sorted so that many keys are found at once.

A key is held as two 64-bit words, which numpy sorts and compares many times faster than strings.
Which order that is does not matter, as long as it is always the same one. N rows or keys.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_dist.reference.arrays import IntArray, KeyArray, LogpArray

Words = npt.NDArray[np.uint64]  # (2, N)
Mask = npt.NDArray[np.bool_]  # (N,)
BLOCK = 1 << 20  # numbers worked on at once, so that what is made of them stays small


@dataclass(frozen=True)
class SortedRows:
    """Rows with distinct keys in the order of `key_order`: words (2, N), log-probs (N, 2)."""

    words: Words
    logps: LogpArray

    def __len__(self) -> int:
        return len(self.logps)

    def find(self, words: Words) -> tuple[IntArray, Mask]:
        """The position of each of N keys, meaningful only where the second array says that it is
        present; fastest for keys in the order of `key_order`."""
        if not len(self):
            return np.zeros(words.shape[1], dtype=np.int64), np.zeros(
                words.shape[1], dtype=np.bool_
            )
        last, (first, second) = len(self) - 1, self.words
        positions = np.minimum(np.searchsorted(first, words[0]), last)
        while True:  # once where no two keys share their first word
            further = (first[positions] == words[0]) & (second[positions] < words[1])
            further &= positions < last
            if not further.any():
                break
            positions += further
        return positions, (np.take(self.words, positions, axis=1) == words).all(axis=0)


def key_words(keys: KeyArray) -> Words:
    """(2, N) words of the keys."""
    pairs = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs.T)


def sort_rows(words: Words, logps: LogpArray) -> SortedRows:
    """The rows by key; of several with the same key the one that comes first."""
    order = key_order(words)
    words = np.take(words, order, axis=1)  # several times faster than words[:, order]
    is_new = np.ones(len(order), dtype=np.bool_)
    np.any(words[:, 1:] != words[:, :-1], axis=0, out=is_new[1:])
    if not is_new.all():
        words, order = words[:, is_new], order[is_new]
    return SortedRows(words, np.take(logps, order, axis=0))


def key_order(words: Words) -> IntArray:
    """(N,) positions that sort the keys by first and second word; equal keys stay as they came."""
    order = stable_order(words[0])
    first = words[0][order]
    tied = _in_runs(first[1:] == first[:-1])
    of_tied = order[tied]
    order[tied] = of_tied[np.lexsort(words[::-1, of_tied])]
    return order


def stable_order(numbers: npt.NDArray[np.uint64]) -> IntArray:
    """(N,) positions that sort N numbers, equal ones as they came: numpy's stable argsort.

    numpy sorts numbers several times faster than positions, so the position is put into the low
    bits of the number, and the few that agree in all other bits are sorted again.
    """
    count = len(numbers)
    bits = np.uint64(max(count - 1, 1).bit_length())
    tagged = numbers >> bits
    tagged <<= bits
    for start in range(0, count, BLOCK):
        piece = tagged[start : start + BLOCK]
        piece |= np.arange(start, start + len(piece), dtype=np.uint64)
    tagged.sort()
    same = np.zeros(max(count - 1, 0), dtype=np.bool_)
    for start in range(0, count, BLOCK):
        piece = tagged[start : start + BLOCK + 1] >> bits
        same[start : start + BLOCK] = piece[1:] == piece[:-1]
    tagged &= (np.uint64(1) << bits) - np.uint64(1)
    order = tagged.view(np.int64)
    tied = _in_runs(same)
    of_tied = order[tied]
    order[tied] = of_tied[np.argsort(numbers[of_tied], kind="stable")]
    return order


def _in_runs(same: Mask) -> IntArray:
    """The positions that are equal to the one before or after; `same` (N - 1,) says of each but the
    last whether the next is equal."""
    edge = np.zeros(1, dtype=np.bool_)
    return np.flatnonzero(np.concatenate([edge, same]) | np.concatenate([same, edge]))
