"""Keys as two words: the same rows are found as by comparing them as strings."""

from pathlib import Path

import numpy as np
import pytest

from dpo_dist.reference import sorted_rows, store
from dpo_dist.reference.pair_key import KEY_DTYPE
from dpo_dist.reference.sorted_rows import key_order, key_words, sort_rows, stable_order
from dpo_dist.reference.store import ScoringContract, open_store

CONTRACT = ScoringContract("aa" * 32, "bb" * 32, "float32", "packed", "completion")


def some_keys(random: np.random.Generator, count: int, *, alike: bool = False) -> np.ndarray:
    """Keys of random bytes; with `alike` many are equal, or equal in one word."""
    content = random.integers(0, 2 if alike else 256, (count, 16), dtype=np.uint8)
    if alike:
        content[:, 2:8] = content[:, 10:] = 0
    return content.reshape(-1).view(KEY_DTYPE)


def in_words(keys: np.ndarray) -> list[tuple[int, int]]:
    content = [key.ljust(16, b"\0") for key in keys.tolist()]
    return [
        (int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")) for key in content
    ]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 1000])
def test_keys_are_sorted_by_their_words_and_equal_ones_stay_as_they_came(
    count: int, alike: bool
) -> None:
    keys = some_keys(np.random.default_rng(count), count, alike=alike)
    words = in_words(keys)
    assert key_order(key_words(keys)).tolist() == sorted(range(count), key=words.__getitem__)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("high", [1, 2, 5, 1000, 1 << 40, 1 << 64])
def test_numbers_are_sorted_as_by_a_stable_argsort(
    high: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_rows, "BLOCK", block)
    random = np.random.default_rng(high % 97)
    for count in (0, 1, 2, 3, 17, 256, 257, 900):
        numbers = random.integers(0, high, count, dtype=np.uint64)
        for each in (numbers, np.sort(numbers), numbers << np.uint64(24)):
            expected = np.argsort(each, kind="stable")
            assert stable_order(each).tolist() == expected.tolist()


@pytest.mark.parametrize("alike", [False, True])
def test_what_is_found_is_what_a_dictionary_finds(alike: bool) -> None:
    random = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 500):
        stored, asked = (some_keys(random, n, alike=alike) for n in (count, 300))
        asked[:100] = random.choice(stored, 100) if count else asked[:100]
        logps = random.normal(size=(count, 2)).astype(np.float32)
        rows = sort_rows(key_words(stored), logps)
        expected: dict[bytes, list[float]] = {}
        for key, row in zip(stored.tolist(), logps.tolist(), strict=True):
            expected.setdefault(key, row)
        assert len(rows) == len(expected)
        positions, present = rows.find(key_words(asked))
        assert present.tolist() == [key in expected for key in asked.tolist()]
        found = rows.logps[positions[present]].tolist()
        assert found == [expected[key] for key in asked[present].tolist()]


def test_a_store_that_grows_answers_as_a_dictionary_does(tmp_path: Path) -> None:
    random, opened = np.random.default_rng(1), open_store(tmp_path, CONTRACT)
    everything = some_keys(random, 3000)
    expected: dict[bytes, list[float]] = {}
    for _ in range(40):
        keys = random.choice(everything, 100)  # some of them again, with other numbers
        logps = random.normal(size=(100, 2)).astype(np.float32)
        before = len(expected)
        for key, row in zip(keys.tolist(), logps.tolist(), strict=True):
            expected.setdefault(key, row)
        assert opened.append(keys, logps, np.arange(100)) == len(expected) - before
        assert opened.num_rows == len(expected)
        present, missing = opened.coverage(everything)
        lacking = [n for n, key in enumerate(everything.tolist()) if key not in expected]
        assert (present, missing.tolist()) == (3000 - len(lacking), lacking)
    for each in (opened, open_store(tmp_path, CONTRACT)):
        assert each.lookup(np.array(list(expected), KEY_DTYPE)).tolist() == [*expected.values()]


def test_appending_sorts_few_rows_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_at_once: list[int] = []

    def counted(words: np.ndarray) -> np.ndarray:
        sorted_at_once.append(words.shape[1])
        return key_order(words)

    random, waves, wave = np.random.default_rng(2), 128, 16
    opened = open_store(tmp_path, CONTRACT)
    for module in (sorted_rows, store):
        monkeypatch.setattr(module, "key_order", counted)
    for _ in range(waves):
        keys, logps = some_keys(random, wave), np.zeros((wave, 2), dtype=np.float32)
        opened.append(keys, logps, np.arange(wave))
    # a wave is looked for twice, but in an empty store, and sorted; then each row is merged
    # log2(waves) times, where one insertion after another moves it waves / 2 times
    assert sum(sorted_at_once) == waves * wave * (3 + np.log2(waves)) - 2 * wave
