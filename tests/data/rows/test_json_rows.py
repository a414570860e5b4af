"""JSON and JSON-lines files: where rows are, odd bytes, and what an error says."""

import json
from pathlib import Path

import pytest

from dpo_dist.data.rows.json_rows import JsonRows, index_json
from dpo_dist.errors import DataError


def written(folder: Path, content: bytes | str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(rows: JsonRows) -> list[tuple[object, str]]:
    return [(dict(row.sound().fields), row.origin) for row in rows.read(range(len(rows)))]


def indexed(folder: Path, content: bytes | str, name: str = "rows.jsonl") -> JsonRows:
    return index_json(written(folder, content, name), name, None)


def error_of(folder: Path, content: bytes | str, name: str = "rows.jsonl") -> str:
    with pytest.raises(DataError) as caught:
        rows_of(indexed(folder, content, name))
    return str(caught.value)


def test_lines_keep_their_numbers_across_blank_lines(tmp_path: Path) -> None:
    rows = indexed(tmp_path, '{"a": 1}\n\n  \n{"a": "ä"}')
    assert rows_of(rows) == [({"a": 1}, "rows.jsonl:1"), ({"a": "ä"}, "rows.jsonl:4")]


@pytest.mark.fault(23, "BOM and CRLF", becomes="read as without")
def test_a_bom_and_windows_line_ends_are_no_part_of_a_row(tmp_path: Path) -> None:
    rows = indexed(tmp_path, b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert rows_of(rows) == [({"a": "x"}, "rows.jsonl:1"), ({"a": "y"}, "rows.jsonl:2")]


def test_rows_are_read_by_position_in_any_order(tmp_path: Path) -> None:
    rows = indexed(tmp_path, "".join(f'{{"a": {n}}}\n' for n in range(5)))
    assert [row.fields["a"] for row in rows.read([4, 0, 2])] == [4, 0, 2]


@pytest.mark.fault(23, "a line of 10 MB", becomes="read")
def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    rows = indexed(tmp_path, json.dumps({"a": text}) + '\n{"a": "next"}\n')
    assert [row.fields["a"] for row in rows.read([0, 1])] == [text, "next"]


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    # U+2028 and a lone \r end a line for str.splitlines, and not for JSON lines
    rows = indexed(tmp_path, '{"a": "x\u2028y"}\n{"a":\r"z"}\n')
    assert rows_of(rows) == [({"a": "x\u2028y"}, "rows.jsonl:1"), ({"a": "z"}, "rows.jsonl:2")]


def test_the_limit_stops_the_scan(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert len(index_json(path, "rows", 2)) == 2
    array = written(tmp_path, '[{"a": 1}, {"a": 2}, broken', "rows.json")
    assert len(index_json(array, "rows", 2)) == 2


@pytest.mark.parametrize(
    "document",
    [
        '[{"a": "ü"}, {"a": "]}"}]',
        '[\n {"a": "ü"},\n\n {"a": "]}"}\n]\n',
        '{"data": [{"a": "ü"}, {"a": "]}"}]}',
        '{\n "version": {"x": [1]},\n "data": [\n {"a": "ü"},\n {"a": "]}"}], "n": 2\n}',
    ],
)
def test_arrays_and_data_objects(tmp_path: Path, document: str) -> None:
    rows = indexed(tmp_path, document, "rows.json")
    assert [row.fields["a"] for row in rows.read([0, 1])] == ["ü", "]}"]
    lines = [1 + document[: document.index(f'{{"a": "{c}')].count("\n") for c in "ü]"]
    assert [rows.origin(0), rows.origin(1)] == [f"rows.json:{line}" for line in lines]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    rows = indexed(tmp_path, '{"a": 1}\n{"a": 2}\n', "rows.json")
    assert [row.fields["a"] for row in rows.read([0, 1])] == [1, 2]


@pytest.mark.fault(23, "0 rows in a file", becomes="no rows")
@pytest.mark.parametrize("content", ["", "\n \n", "[]", '{"data": []}'])
def test_no_rows(tmp_path: Path, content: str) -> None:
    assert len(indexed(tmp_path, content, "rows.json")) == 0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, '{"a": 1}\n{"a": }\n{"a": 3}\n') == (
        "rows.jsonl:2 is not JSON (Expecting value, column 7); expected a JSON object. "
        "Correct or remove it."
    )


def test_a_damaged_first_line_is_a_line_and_no_document(tmp_path: Path) -> None:
    assert error_of(tmp_path, '{"a": \n{"a": 3}\n').startswith("rows.jsonl:1 is not JSON")


def test_a_damaged_array_is_named_by_line(tmp_path: Path) -> None:
    assert error_of(tmp_path, '[{"a": 1},\n{"a": 2}\n{"a": 3}]', "rows.json") == (
        "rows.json:3 is not JSON (Expecting ',' or ']', column 1); expected a JSON object. "
        "Correct or remove it."
    )
    assert error_of(tmp_path, '[{"a": 1},', "rows.json").startswith("rows.json:1 is not JSON")
    assert 'no "data" array in the object' in error_of(tmp_path, '{\n"rows": [1]\n}', "r.json")


def test_a_row_that_is_no_object_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, '{"a": 1}\n[1]\n') == (
        "rows.jsonl:2 holds a list; expected a JSON object with the fields of a preference row. "
        "Correct or remove the row."
    )
    assert "rows.json:1 holds a number" in error_of(tmp_path, "[1, 2]", "rows.json")


@pytest.mark.fault(23, "bytes that are not UTF-8", becomes="named with their place")
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n') == (
        "rows.jsonl:2 is not UTF-8 (byte 0xe9 at byte 11); expected UTF-8 text. "
        "Convert the file, for example with iconv."
    )


def test_utf16_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, '{"a": 1}'.encode("utf-16")) == (
        "rows.jsonl is UTF-16 text; expected UTF-8. Convert it, for example with iconv."
    )
