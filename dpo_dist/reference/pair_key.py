"""The identity of a pair: a digest of exactly the token ids that get scored."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")

Ids = Sequence[int] | npt.NDArray[np.integer]
Keys = Sequence[bytes] | npt.NDArray[np.bytes_] | npt.NDArray[np.uint8]


def pair_key(prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids) -> bytes:
    """The 16-byte BLAKE2b digest of the scored token ids of one pair.

    The three lengths go in first, so moving a token across a boundary changes the key.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(struct.pack("<3Q", len(prompt_ids), len(chosen_ids), len(rejected_ids)))
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.digest()


def answer_key(prompt_ids: Ids, answer_ids: Ids) -> bytes:
    """The 16-byte digest of one answer behind its prompt, equal in all pairs that it stands in."""
    return pair_key(prompt_ids, answer_ids, ())


def as_key_array(keys: Keys) -> npt.NDArray[np.bytes_]:
    """Brings keys (16-byte strings, or the rows of an (N, 16) uint8 array) to an (N,) S16 array.

    Only compare the elements as an array: numpy drops trailing zero bytes when it hands out one.
    """
    if isinstance(keys, np.ndarray) and keys.dtype == KEY_DTYPE:
        return keys.view(KEY_DTYPE).reshape(-1)
    if isinstance(keys, np.ndarray) and keys.dtype == np.uint8:
        rows = np.ascontiguousarray(keys)
        assert rows.ndim == 2 and rows.shape[1] == KEY_BYTES, f"keys have shape {rows.shape}"
        return rows.view(KEY_DTYPE).reshape(-1)
    strings = list(keys)
    wrong = {len(key) for key in strings} - {KEY_BYTES}
    assert not wrong, f"keys of {sorted(wrong)} bytes, expected {KEY_BYTES}"
    return np.array(strings, dtype=KEY_DTYPE)
