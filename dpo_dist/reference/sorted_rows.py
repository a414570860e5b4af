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
        return positions, (self.words[:, positions] == words).all(axis=0)


def key_words(keys: KeyArray) -> Words:
    """(2, N) words of the keys."""
    pairs = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs.T)


def sort_rows(words: Words, logps: LogpArray) -> SortedRows:
    """The rows by key; of several with the same key the one that comes first."""
    order = key_order(words)
    words = words[:, order]
    is_new = np.ones(len(order), dtype=np.bool_)
    np.any(words[:, 1:] != words[:, :-1], axis=0, out=is_new[1:])
    if not is_new.all():
        words, order = words[:, is_new], order[is_new]
    return SortedRows(words, logps[order])


def key_order(words: Words) -> IntArray:
    """(N,) positions that sort the keys by first and second word; equal keys stay as they came."""
    count = words.shape[1]
    # numpy sorts numbers several times faster than it sorts positions by numbers, so the position
    # stands in the low bits of the number
    bits = np.uint64(max(count - 1, 1).bit_length())
    tagged = words[0] >> bits << bits
    tagged |= np.arange(count, dtype=np.uint64)
    tagged.sort()
    order = (tagged & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    tagged >>= bits
    # the few keys that agree in all other bits, and those that are given twice
    same = np.zeros(count + 1, dtype=np.bool_)
    same[1:-1] = tagged[1:] == tagged[:-1]
    tied = np.flatnonzero(same[1:] | same[:-1])
    of_tied = order[tied]
    order[tied] = of_tied[np.lexsort(words[::-1, of_tied])]
    return order
