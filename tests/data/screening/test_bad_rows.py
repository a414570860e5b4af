"""Rows that cannot be read, one in a million: named ten at a time, or dropped up to a share."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.prepared import make_config, orca_row, pairs_of, report_of, write_jsonl

from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

BROKEN: list[Any] = [
    '{"prompt": "P", "chosen": true, "rejected": "True."}',  # of a public test set
    '{"prompt": "P", "chosen": "a"}',
    '{"prompt": "P", "chosen": "a", "rejected": null}',
    "{'prompt': 'P', 'chosen': 'a', 'rejected': 'b'}",
    '{"prompt": "P", "chosen": "a", "rejected": ["b"]}',
    '[1, 2, 3]',
    b'{"prompt": "P", "chosen": "caf\xe9", "rejected": "b"}',
]  # fmt: skip


def rows_with(folder: Path, broken: dict[int, Any], count: int = 200) -> Path:
    """A file of plain pairs with these lines, counted from 1, in place of theirs."""
    lines = [
        json.dumps({"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": f" no {n}"}).encode()
        for n in range(count)
    ]
    for number, line in broken.items():
        lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def error_of(folder: Path, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(folder, **data))
    return str(caught.value)


def test_one_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = rows_with(tmp_path, {140: BROKEN[0]})
    assert error_of(tmp_path) == (
        f"{path}:140: field 'chosen' is a boolean; expected a string. "
        "Correct or remove the row. Or set data.on_bad_row=drop."
    )


def test_the_first_ten_are_told_at_once(tmp_path: Path) -> None:
    broken = {5 * n + 3: BROKEN[n % len(BROKEN)] for n in range(12)}
    path = rows_with(tmp_path, broken)
    head, *lines, end = error_of(tmp_path, num_workers=1).splitlines()
    assert head == "12 train rows so far cannot be read:"
    assert (
        [re.match(rf"  {re.escape(str(path))}:(\d+)", line).group(1) for line in lines]
        == [  # pyright: ignore
            str(number) for number in list(broken)[:10]
        ]
    )
    assert lines[0].endswith(":3: field 'chosen' is a boolean; expected a string")
    assert end == (
        "expected none, because data.on_bad_row is raise. Correct or remove the row. Correct or "
        "remove the row, or map the column with `columns`. JSON has double quotes: write rows with "
        "json.dumps(row), not with str(row). Convert the file, for example with iconv. Or set "
        "data.on_bad_row=drop."
    )


def test_few_are_told_at_the_end(tmp_path: Path) -> None:
    path = rows_with(tmp_path, {7: BROKEN[1], 190: BROKEN[2]})
    assert error_of(tmp_path).splitlines()[:3] == [
        "2 train rows cannot be read:",
        f"  {path}:7 has no field 'rejected' (it has prompt, chosen); expected a field 'rejected' "
        "in every row",
        f"  {path}:190: field 'rejected' is null; expected text or messages",
    ]


@pytest.mark.parametrize("first", [1, 30])
def test_dropped_they_are_counted_by_reason(tmp_path: Path, first: int) -> None:
    """Also where the first row, which tells the format, is one of them."""
    broken = {first: BROKEN[0], 60: BROKEN[0], 90: BROKEN[3]}
    path = rows_with(tmp_path, broken)
    config = make_config(tmp_path, on_bad_row="drop", max_bad_rows=0.02)
    counts = report_of(config)["splits"]["train"]
    assert (counts["rows"], counts["pairs"], counts["dropped"]["bad_row"]) == (200, 197, 3)
    assert counts["bad_rows"][0] == {
        "found": "field 'chosen' is a boolean", "rows": 2, "first": f"{path}:{first}",
    }  # fmt: skip
    assert [bad["rows"] for bad in counts["bad_rows"]] == [2, 1]
    kept = pairs_of(config)
    assert not {kept.origin(i) for i in range(len(kept))} & {f"{path}:{n}" for n in broken}


def test_more_than_the_share_are_refused(tmp_path: Path) -> None:
    rows_with(tmp_path, {n: BROKEN[0] for n in (9, 19, 29)})
    said = error_of(tmp_path, on_bad_row="drop")
    assert said.startswith("3 train rows cannot be read:\n")
    assert said.endswith(
        "expected at most data.max_bad_rows = 1.00% of 200 rows. Correct or remove the row. "
        "Or set data.max_bad_rows=0.015."
    )


def test_csv_rows_with_too_many_fields(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    lines = [f"say {n},yes {n},no {n}" for n in range(100)]
    lines[10] = "a,b,c,d"
    path.write_text("\n".join(["prompt,chosen,rejected", *lines]))
    source = {"train": [{"path": str(path)}]}
    assert error_of(tmp_path, **source).startswith(f"{path}:12 has 4 fields; expected 3, as in")
    counts = report_of(make_config(tmp_path, on_bad_row="drop", **source))["splits"]["train"]
    assert (counts["pairs"], counts["bad_rows"][0]["found"]) == (99, "has 4 fields")


def test_labelled_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{n // 2}", "completion": f" a{n}", "label": n % 2} for n in range(200)]
    rows[4]["label"] = "good"
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"train": [{"path": str(path), "format": "labelled"}]}
    assert error_of(tmp_path, **source).startswith(f"{path}:5: field 'label' is 'good'; expected")
    counts = report_of(make_config(tmp_path, on_bad_row="drop", **source))["splits"]["train"]
    assert (counts["pairs"], counts["dropped"]["bad_row"], counts["dropped"]["unpaired"]) == (
        99, 1, 1,
    )  # fmt: skip


def test_a_source_of_which_nothing_can_be_read_names_its_first_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": 1, "chosen": 2}] * 3)
    assert error_of(tmp_path, on_bad_row="drop").startswith(f"{path}:1 has the columns prompt, ch")


def test_the_preview_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = orca_row(0)
    write_jsonl(tmp_path / "train.jsonl", [row, row | {"chosen": 3}])
    prepare.preview(make_config(tmp_path), 2)
    assert "dropped, bad_row: field 'chosen' is a number" in capsys.readouterr().out
