import hashlib
import struct

import numpy as np
import pytest

from dpo_dist.reference.pair_key import KEY_DTYPE, as_key_array, pair_key


def test_the_key_is_the_documented_digest() -> None:
    content = struct.pack("<3Q", 2, 1, 3) + np.array([5, 6, 7, 8, 9, 10], "<i4").tobytes()
    expected = hashlib.blake2b(content, digest_size=16).digest()
    assert pair_key([5, 6], [7], [8, 9, 10]) == expected
    assert pair_key(np.array([5, 6]), np.array([7]), np.array([8, 9, 10])) == expected


def test_boundaries_and_order_matter() -> None:
    keys = {
        pair_key([1, 2], [3], [4]),
        pair_key([1], [2, 3], [4]),
        pair_key([1, 2], [3, 4], []),
        pair_key([1, 2], [4], [3]),
        pair_key([2, 1], [3], [4]),
        pair_key([1, 2, 3, 4], [], []),
    }
    assert len(keys) == 6


def test_key_arrays_from_strings_and_bytes_columns_agree() -> None:
    keys = [pair_key([index], [1], [2]) for index in range(100)]
    keys += [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15)]  # numpy hides trailing zeros
    strings = as_key_array(keys)
    column = as_key_array(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16))
    assert strings.dtype == KEY_DTYPE and strings.shape == (103,)
    assert strings.tobytes() == column.tobytes() == b"".join(keys)
    assert len(np.unique(strings)) == 103
    assert (as_key_array(strings) == strings).all()
    assert as_key_array([]).shape == (0,)


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"keys of \[8\] bytes, expected 16"):
        as_key_array([bytes(16), bytes(8)])
    with pytest.raises(AssertionError, match=r"shape \(2, 8\)"):
        as_key_array(np.zeros((2, 8), dtype=np.uint8))
