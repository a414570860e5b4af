"""The part files: what is read back, what is refused, and numbering without a lock."""

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.reference.parts import ROW_DTYPE, num_rows_in, part_paths, publish_part, read_part

CONTRACT = "ab" * 32


def some_rows(count: int, value: float = -1.5) -> np.ndarray:
    rows = np.empty(count, dtype=ROW_DTYPE)
    rows["key"] = [index.to_bytes(16, "big") for index in range(count)]
    rows["logps"] = value
    return rows


def test_a_part_is_80_bytes_and_24_a_row_as_documented(tmp_path: Path) -> None:
    publish_part(tmp_path, some_rows(3), CONTRACT)
    (path,) = part_paths(tmp_path)
    content = path.read_bytes()
    assert path.name == "part-000000.rows" and len(content) == 80 + 3 * 24
    assert content[:8] == b"DPOREF1\n"
    assert content[8:40] == bytes.fromhex(CONTRACT)
    assert struct.unpack("<Q", content[40:48]) == (3,)
    assert content[80 + 24 :][:24] == bytes(15) + b"\1" + struct.pack("<2f", -1.5, -1.5)
    assert num_rows_in(path) == 3
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays
    rows = read_part(path, CONTRACT)
    assert rows is not None and rows.tobytes() == some_rows(3).tobytes()


def damage_bit(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 4]) + content[101:]


@pytest.mark.fault(
    13,
    "reference parts with a bit flipped, cut short, empty, zeros",
    becomes="set aside with the reason",
)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_bit, "checksum differs"),
        (lambda content: content[:-1], "71 bytes of rows, 3 rows were written"),
        (lambda content: content[:-24], "48 bytes of rows, 3 rows were written"),
        (lambda content: content[:50], "50 bytes, the header alone has 80"),
        (lambda content: b"", "0 bytes, the header alone has 80"),
        (lambda content: bytes(len(content)), "not a part of a reference store"),
        (lambda content: content[:9] + b"\0" + content[10:], "checksum differs"),
    ],
)
def test_a_damaged_part_is_put_aside_with_the_reason(
    damage: Callable[[bytes], bytes], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish_part(tmp_path, some_rows(3), CONTRACT)
    (path,) = part_paths(tmp_path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)

    assert read_part(path, CONTRACT) is None
    assert part_paths(tmp_path) == []
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.read_bytes() == damaged
    assert caplog.messages == [
        f"{path} is corrupt ({reason}): its rows count as missing, the file is kept as {kept}"
    ]


def test_a_part_of_another_contract_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish_part(tmp_path, some_rows(3), "cd" * 32)
    assert read_part(part_paths(tmp_path)[0], CONTRACT) is None
    assert "written under another scoring contract" in caplog.text


def test_a_part_with_a_nan_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish_part(tmp_path, some_rows(3, value=float("nan")), CONTRACT)
    assert read_part(part_paths(tmp_path)[0], CONTRACT) is None
    assert "holds numbers that are not finite" in caplog.text


def test_a_part_that_has_gone_is_skipped(tmp_path: Path) -> None:
    assert read_part(tmp_path / "part-000000.rows", CONTRACT) is None


def test_numbers_go_on_after_a_hole_and_sort_as_numbers(tmp_path: Path) -> None:
    for name in ("part-999999.rows", "part-1000000.rows", "part-x.rows", ".part-000009.rows"):
        (tmp_path / name).touch()
    publish_part(tmp_path, some_rows(1), CONTRACT)
    assert [path.name for path in part_paths(tmp_path)] == [
        "part-999999.rows",
        "part-1000000.rows",
        "part-1000001.rows",
    ]


def test_publishers_at_the_same_time_never_take_the_same_number(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=publish_part, args=(tmp_path, some_rows(1, -float(n)), CONTRACT))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = part_paths(tmp_path)
    assert [path.name for path in paths] == [f"part-{number:06d}.rows" for number in range(20)]
    parts = [read_part(path, CONTRACT) for path in paths]
    assert {float(rows["logps"][0, 0]) for rows in parts if rows is not None} == {
        -float(n) for n in range(20)
    }
