"""The reference store: coverage, sharing, damage, kills and what an error says."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.errors import ReferenceStoreError
from dpo_dist.reference.store import (
    ReferenceStore,
    ScoringContract,
    explain_miss,
    list_contracts,
    open_store,
)

CONTRACT = ScoringContract(
    reference_digest="aa" * 32,
    tokenizer_digest="bb" * 32,
    dtype="bfloat16",
    layout="packed",
    mask_rule="completion",
)


def some_keys(start: int, stop: int) -> list[bytes]:
    return [hashlib.blake2b(b"%d" % n, digest_size=16).digest() for n in range(start, stop)]


def some_logps(start: int, stop: int) -> np.ndarray:
    return np.stack([-np.arange(start, stop), -2.5 * np.arange(start, stop)], 1).astype(np.float32)


def append(store: ReferenceStore, start: int, stop: int) -> int:
    return store.append(some_keys(start, stop), some_logps(start, stop), np.arange(start, stop))


def part_names(store: ReferenceStore) -> list[str]:
    return sorted(path.name for path in store.directory.glob("part-*.rows"))


def test_rows_come_back_bit_equal_in_the_order_asked(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    rng = np.random.default_rng(0)
    keys, logps = some_keys(0, 100), rng.normal(-300, 99, (100, 2)).astype(np.float32)
    assert store.append(keys, logps, np.arange(100)) == 100
    order = rng.permutation(100)
    for opened in (store, open_store(tmp_path, CONTRACT)):
        found = opened.lookup([keys[index] for index in order])
        assert found.dtype == np.float32 and found.tobytes() == logps[order].tobytes()


def test_an_absent_store_is_empty_and_nothing_is_created(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", CONTRACT)
    present, missing = store.coverage(some_keys(0, 4))
    assert (store.num_rows, present, missing.tolist()) == (0, 0, [0, 1, 2, 3])
    assert store.lookup([]).shape == (0, 2)
    assert list_contracts(tmp_path / "store") == []
    assert list(tmp_path.iterdir()) == []


def test_a_grown_data_set_lacks_only_the_new_rows(tmp_path: Path) -> None:
    append(open_store(tmp_path, CONTRACT), 10, 30)
    store = open_store(tmp_path, CONTRACT)
    present, missing = store.coverage(some_keys(5, 35))
    assert present == 20
    assert missing.tolist() == [*range(5), *range(25, 30)]
    assert append(store, 5, 35) == 10  # and only these are written
    assert store.coverage(some_keys(5, 35))[0] == 30
    assert append(store, 5, 35) == 0
    assert part_names(store) == ["part-000000.rows", "part-000001.rows"]


def test_a_key_given_twice_is_stored_once_with_its_first_value(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    (key,) = some_keys(0, 1)
    logps = np.array([[-1, -2], [-3, -4]], dtype=np.float32)
    assert store.append([key, key], logps, np.array([7, 8])) == 1
    assert store.lookup([key, key]).tolist() == [[-1, -2], [-1, -2]]


def test_a_missing_row_is_an_error_that_names_the_pairs(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    append(store, 0, 3)
    with pytest.raises(ReferenceStoreError) as error:
        store.lookup(some_keys(0, 10))
    assert str(error.value) == (
        f"{store.directory} lacks reference log-probs for 7 of 10 pairs (pair index 3, 4, 5, 6, 7, "
        "...); expected a row for every pair. Run `dpo-dist reference`, which scores the missing "
        "pairs only."
    )
    with pytest.raises(ReferenceStoreError, match=r"1 of 2 pairs \(pair index 900\)"):
        store.lookup(some_keys(2, 4), pair_indices=np.array([800, 900]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_written(
    bad: float, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "store", CONTRACT)
    logps = some_logps(0, 10)
    logps[4, 1] = logps[6, 0] = bad
    with pytest.raises(ReferenceStoreError) as error:
        store.append(some_keys(0, 10), logps, np.arange(100, 110))
    assert str(error.value) == (
        "reference log-probs are not finite for 2 of 10 pairs (pair index 104, 106); "
        "expected finite "
        "numbers. Check the reference weights and these pairs, or score them in float32."
    )
    assert list(tmp_path.iterdir()) == []


def test_wrong_shapes_and_types_are_programmer_mistakes(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    with pytest.raises(AssertionError, match=r"logps \(3, 2\) for 2 keys"):
        store.append(some_keys(0, 2), some_logps(0, 3), np.arange(2))
    with pytest.raises(AssertionError, match="logps are float64, expected float32"):
        doubles = some_logps(0, 2).astype(np.float64)
        store.append(some_keys(0, 2), doubles, np.arange(2))  # pyright: ignore[reportArgumentType]


@pytest.mark.fault(
    21,
    "another model, dtype, layout or any other field of the contract",
    becomes="a miss, with the difference",
)
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ScoringContract)])
def test_each_field_of_the_contract_makes_another_store(field: str, tmp_path: Path) -> None:
    append(open_store(tmp_path, CONTRACT), 0, 300)
    other = dataclasses.replace(CONTRACT, **{field: 2 if field == "schema_version" else "cc" * 32})
    store = open_store(tmp_path, other)
    assert store.coverage(some_keys(0, 300))[0] == 0
    (line,) = explain_miss(tmp_path, other)
    found = str(getattr(CONTRACT, field))
    found = found[:12] + "..." if field.endswith("digest") else found
    expected = "2" if field == "schema_version" else "cccccccccccc..."
    assert line == f"the store holds 300 rows scored with {field} {found}, expected {expected}"


def test_a_miss_is_explained_nearest_contract_first(tmp_path: Path) -> None:
    far = dataclasses.replace(CONTRACT, dtype="float32", layout="padded")
    append(open_store(tmp_path, far), 0, 7)
    append(open_store(tmp_path, dataclasses.replace(CONTRACT, dtype="float32")), 0, 5)
    assert explain_miss(tmp_path, CONTRACT) == [
        "the store holds 5 rows scored with dtype float32, expected bfloat16",
        "the store holds 7 rows scored with dtype float32, expected bfloat16; layout padded, "
        "expected "
        "packed",
    ]
    append(open_store(tmp_path, CONTRACT), 0, 9)
    assert len(explain_miss(tmp_path, CONTRACT)) == 2  # a hit is no miss


def test_a_contract_of_another_version_or_an_unreadable_one_is_still_told(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    append(store, 0, 5)
    expected = dataclasses.replace(CONTRACT, dtype="float32")
    path = store.directory / "contract.json"
    path.write_text(json.dumps(dataclasses.asdict(expected) | {"temperature": 1}))
    assert explain_miss(tmp_path, expected) == [
        "the store holds 5 rows scored with temperature 1, expected None"
    ]
    for text in ("{", "[]", "7"):
        path.write_text(text)
        assert explain_miss(tmp_path, expected) == [
            "the store holds 5 rows scored with unknown settings: its contract.json is unreadable"
        ]


def test_contracts_are_listed_with_their_counts(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTRACT)
    append(store, 0, 5)
    append(store, 5, 15)
    append(store, 15, 20)
    (store.directory / "part-000002.rows").write_bytes(b"torn")
    open_store(tmp_path, CONTRACT)
    (stored,) = list_contracts(tmp_path)
    assert stored.directory == store.directory
    assert stored.fields == dataclasses.asdict(CONTRACT)
    assert (stored.num_rows, stored.num_parts, stored.num_quarantined) == (15, 2, 1)


@pytest.mark.fault(20, "a bit of one part flipped", becomes="its rows are missing, and no others")
def test_a_flipped_bit_loses_the_rows_of_that_part_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path, CONTRACT)
    for start in (0, 10, 20):
        append(store, start, start + 10)
    path = store.directory / "part-000001.rows"
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)

    store = open_store(tmp_path, CONTRACT)
    assert "part-000001.rows is corrupt (checksum differs)" in caplog.text
    present, missing = store.coverage(some_keys(0, 30))
    assert present == 20 and missing.tolist() == list(range(10, 20))
    assert append(store, 0, 30) == 10
    assert open_store(tmp_path, CONTRACT).lookup(some_keys(0, 30)).tolist() == (
        some_logps(0, 30).tolist()
    )


def test_a_row_keeps_the_value_that_was_committed_first(tmp_path: Path) -> None:
    first, second = open_store(tmp_path, CONTRACT), open_store(tmp_path, CONTRACT)
    append(first, 0, 5)
    noisy = some_logps(0, 8) + np.float32(0.25)
    assert second.append(some_keys(0, 8), noisy, np.arange(8)) == 3
    first.refresh()
    for store in (first, second, open_store(tmp_path, CONTRACT)):
        found = store.lookup(some_keys(0, 8))
        assert found.tobytes() == np.concatenate([some_logps(0, 5), noisy[5:]]).tobytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ReferenceStoreError) as error:
        open_store(blocked, CONTRACT)
    assert str(error.value) == (
        f"cannot read the reference store {blocked / CONTRACT.digest()[:16]} (Not a directory); "
        "expected a readable and writable folder, free space, and a file system with hard links. "
        "Fix this, or set reference.store_dir to another folder."
    )
    store = open_store(tmp_path / "store", CONTRACT)
    (tmp_path / "store").write_text("came later")
    with pytest.raises(ReferenceStoreError, match="cannot (read|write) the reference store"):
        append(store, 0, 1)


APPENDER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/reference"]
from test_reference_store import CONTRACT, append, open_store
store = open_store(Path(sys.argv[2]), CONTRACT)
for start in range(int(sys.argv[3]), 100_000, 50):
    append(store, start, start + 50)
    print(start + 50, flush=True)
"""


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    repository = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, repository, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault(
    20,
    "SIGKILL while rows are appended, four times",
    becomes="every acknowledged row is there",
)
def test_a_process_killed_while_it_appends_leaves_a_whole_store(tmp_path: Path) -> None:
    done = 0
    for attempt in range(4):
        with start_python(APPENDER, tmp_path, done) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(0.03 + 0.017 * attempt)
            os.kill(process.pid, signal.SIGKILL)
            acknowledged = (first + process.stdout.read()).split()
        store = open_store(tmp_path, CONTRACT)
        assert store.num_rows >= int(acknowledged[-1]) > done
        assert store.lookup(some_keys(0, store.num_rows)).tolist() == (
            some_logps(0, store.num_rows).tolist()
        )
        assert not (store.directory / "quarantine").exists()
        done = store.num_rows


COMPETITOR = """
import sys, json
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/reference"]
import numpy as np
from test_reference_store import CONTRACT, open_store, some_keys, some_logps
store = open_store(Path(sys.argv[2]), CONTRACT)
print("ready", flush=True)
sys.stdin.readline()
seen = []
for start in range(0, 1000, 20):
    keys = some_keys(start, start + 20)
    logps = some_logps(start, start + 20) + np.float32(sys.argv[3])
    store.append(keys, logps, np.arange(20))
    seen += store.lookup(keys).tolist()
print(json.dumps(seen))
"""


def test_two_processes_that_append_at_once_see_the_same_rows(tmp_path: Path) -> None:
    repository = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMPETITOR, repository, str(tmp_path), noise],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for noise in ("0.25", "0.5")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    seen = [json.loads(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]

    final = open_store(tmp_path, CONTRACT).lookup(some_keys(0, 1000))
    assert seen[0] == seen[1] == final.tolist()
    assert set((final - some_logps(0, 1000))[:, 0].tolist()) <= {0.25, 0.5}


def test_300_thousand_rows_are_read_and_found_without_a_call_for_each(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (300_000, 16)).astype(np.uint8)
    store = open_store(tmp_path, CONTRACT)
    logps = np.zeros((300_000, 2), dtype=np.float32)
    for start in range(0, 300_000, 50_000):
        stop = start + 50_000
        store.append(keys[start:stop], logps[start:stop], np.arange(start, stop))
    calls: list[str] = []  # of Python's and C's functions
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        found = open_store(tmp_path, CONTRACT).lookup(keys)
    finally:
        sys.setprofile(None)
    assert len(found) == 300_000 and 100 < len(calls) < 10_000


def test_it_imports_without_torch() -> None:
    code = "import sys, dpo_dist.reference.store; sys.exit('torch' in sys.modules)"
    repository = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
