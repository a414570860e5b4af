"""Parquet, CSV, `datasets` folders and hub data sets, and what an error says."""

import random
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.rows.formats import READ_COLUMNS, read_pair
from dpo_dist.data.rows.stream_rows import open_hub
from dpo_dist.data.rows.table_rows import (
    SPOOL_ROWS,
    TableRows,
    digest_of_table,
    open_csv,
    open_folder,
    open_parquet,
)
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.errors import DataError

NAMES = ("prompt", "chosen", "n")


def rows_of(rows: TableRows) -> list[tuple[object, str]]:
    return [(dict(row.sound().fields), row.origin) for row in rows.read(range(len(rows)))]


def csv_of(folder: Path, content: bytes | str, limit: int | None = None) -> TableRows:
    path = folder / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_csv(path, "rows.csv", folder / "scratch.arrow", limit)


def error_of_csv(folder: Path, content: bytes | str) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(csv_of(folder, content))
    return str(caught.value)


def test_parquet_with_messages(tmp_path: Path) -> None:
    chosen = [{"role": "user", "content": "?", "name": None}]
    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": [chosen, chosen]}), tmp_path / "r")
    rows = open_parquet(tmp_path / "r", "rows.parquet", tmp_path / "scratch.arrow", None, NAMES)
    read = [{"role": "user", "content": "?"}]
    assert rows_of(rows) == [
        ({"prompt": "a", "chosen": read}, "rows.parquet:1"),
        ({"prompt": "b", "chosen": read}, "rows.parquet:2"),
    ]


def test_the_nulls_that_a_table_adds_are_no_keys(tmp_path: Path) -> None:
    calls = [{"city": "SF"}, {"day": "Monday", "at": {"hour": 9}}]
    turns = [[{"role": "assistant", "tool_calls": [{"arguments": call}]}] for call in calls]
    pq.write_table(pa.table({"chosen": turns, "prompt": ["a", None]}), tmp_path / "r")
    rows = open_parquet(tmp_path / "r", "rows.parquet", tmp_path / "scratch.arrow", None, NAMES)
    first, second = (row.fields for row in rows.read([0, 1]))
    assert [fields["chosen"] for fields in (first, second)] == turns
    assert second["prompt"] is None, "a column is there though it is null"


WIDE_ROWS, ESSAY_BYTES = 40, 500_000


def wide_table() -> pa.Table:
    """Rows with what no format reads beside them: an essay, notes and, in turns, images."""
    image = {"bytes": random.Random(0).randbytes(ESSAY_BYTES), "path": None}
    rows = [
        {
            "prompt": f"P{n}", "chosen": "a", "rejected": "b", "user_notes": f"Why {n}?",
            "essay": "x" * ESSAY_BYTES, "number": n, "image": image if n % 2 else None,
            "images": [] if n % 2 else [image],
        }
        for n in range(WIDE_ROWS)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def check_wide(rows: TableRows) -> None:
    first, second = rows.read([0, 1])
    assert first.fields.keys() == second.fields.keys() == set(wide_table().column_names)
    assert first.fields["user_notes"] == "Why 0?" and second.fields["user_notes"] is None
    assert [first.fields[name] for name in ("image", "images", "number")] == [False, True, None]
    assert [second.fields[name] for name in ("image", "images")] == [True, False]
    assert [row.fields["prompt"] for row in (first, second)] == ["P0", "P1"]


def bytes_read() -> int:
    (line,) = (s for s in Path("/proc/self/io").read_text().splitlines() if "rchar" in s)
    return int(line.split()[1])


def test_parquet_columns_that_no_format_reads_are_not_read(tmp_path: Path) -> None:
    path, scratch_path = tmp_path / "r", tmp_path / "scratch.arrow"
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    pq.write_table(wide_table(), path, row_group_size=2, **options)
    size = path.stat().st_size
    assert size > 1.9 * WIDE_ROWS * ESSAY_BYTES
    before = bytes_read()
    rows = open_parquet(path, "rows.parquet", scratch_path, None, READ_COLUMNS)
    check_wide(rows)
    # one page of essays is read: the first might be a question
    assert bytes_read() - before < size / 10
    assert scratch_path.stat().st_size < 30_000


def test_columns_of_a_data_set_that_no_format_reads_are_not_decoded(tmp_path: Path) -> None:
    table = datasets.Dataset(wide_table())
    features = datasets.Features({**table.features, "image": datasets.Image()})
    table.cast(features).save_to_disk(str(tmp_path / "data"))  # the bytes are no image
    rows = open_folder(tmp_path / "data", "data", "train").reading(READ_COLUMNS)
    check_wide(rows)
    start = time.process_time()
    list(rows.read(range(WIDE_ROWS)))
    assert time.process_time() - start < 0.1
    (last,) = rows.first(1).read([0])
    assert last.fields["user_notes"] == "Why 0?"


def test_what_is_refused_by_the_names_of_columns_is_refused_in_tables_too(tmp_path: Path) -> None:
    def error_of(**columns: list[Any]) -> str:
        pq.write_table(pa.table({"chosen": [" a"], "rejected": [" b"], **columns}), path)
        section = SourceSection.model_validate({"path": str(path)})
        with pytest.raises(DataError) as caught:
            (source,) = open_sources([section], "train", tmp_path)
            for row in source.rows.read([0]):
                read_pair(row, source.row_format, source.name)
        return str(caught.value)

    path = tmp_path / "rows.parquet"
    for name in ("query", "user_notes"):
        assert error_of(**{name: ["Why?"]}).startswith(
            f"{path}:1 has no prompt, and a column {name!r} that would not be read"
        )
    assert error_of(prompt=["P"], images=[[b"png"]]).startswith(
        f"{path}:1: field 'images' holds media; expected text only"
    )


def test_a_table_without_any_column_of_ours_has_its_rows_and_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"good": ["a"], "bad": ["b"]}), tmp_path / "r")
    rows = open_parquet(tmp_path / "r", "r", tmp_path / "scratch", None, READ_COLUMNS)
    assert rows_of(rows) == [({"good": "a", "bad": "b"}, "r:1")]


def test_parquet_is_streamed_up_to_the_limit(tmp_path: Path) -> None:
    numbers = list(range(3 * SPOOL_ROWS))
    pq.write_table(pa.table({"n": numbers}), tmp_path / "r", row_group_size=700)
    for limit in (None, 1, SPOOL_ROWS, SPOOL_ROWS + 5):
        rows = open_parquet(tmp_path / "r", "r", tmp_path / f"scratch{limit}", limit, NAMES)
        assert len(rows) == (limit or len(numbers))
        last = len(rows) - 1
        assert [row.fields["n"] for row in rows.read([last, 0])] == [last, 0]


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("no parquet at all")
    with pytest.raises(DataError) as caught:
        open_parquet(tmp_path / "r", "rows.parquet", tmp_path / "scratch", None, NAMES)
    assert str(caught.value).startswith("rows.parquet is not readable as Parquet (")
    assert str(caught.value).endswith(
        "; expected a Parquet file. Write it again, or give the file its right suffix."
    )


def test_csv_is_text_and_knows_its_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfprompt,chosen\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n,007\r\n'
    assert rows_of(csv_of(tmp_path, content)) == [
        ({"prompt": "1", "chosen": 'two\r\nlines, "quoted"'}, "rows.csv:2"),
        ({"prompt": "", "chosen": "007"}, "rows.csv:5"),
    ]


def test_csv_takes_long_fields_and_stops_at_the_limit(tmp_path: Path) -> None:
    content = "a\n" + "x" * 300_000 + "\n" + "y\n" * 2000
    assert len(csv_of(tmp_path, content)) == 2001
    assert [f["a"] for f, _ in rows_of(csv_of(tmp_path, content, limit=2))] == ["x" * 300_000, "y"]


@pytest.mark.parametrize("content", ["", "a,b\n"])
def test_csv_without_rows(tmp_path: Path, content: str) -> None:
    assert len(csv_of(tmp_path, content)) == 0


def test_csv_with_a_wrong_number_of_fields(tmp_path: Path) -> None:
    assert error_of_csv(tmp_path, 'a,b\n"1\n1",2\n3\n') == (
        "rows.csv:4 has 1 fields; expected 2, as in the header (a, b). "
        "Put fields with commas or line breaks in double quotes."
    )


def test_csv_with_a_column_twice(tmp_path: Path) -> None:
    assert error_of_csv(tmp_path, "a,a\n1,2\n") == (
        "rows.csv:1 names a column twice (a, a); expected a header of distinct names. Rename one."
    )


def test_csv_with_open_quotes(tmp_path: Path) -> None:
    assert error_of_csv(tmp_path, 'a\n1\n"2\n') == (
        "rows.csv is not CSV after line 2 (unexpected end of data); expected comma-separated "
        "columns, fields with line breaks in double quotes. Correct it."
    )


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    assert error_of_csv(tmp_path, b"a\n1\ncaf\xe9\n") == (
        "rows.csv is not UTF-8 (byte 0xe9 after line 1); expected UTF-8 text. "
        "Convert it, for example with iconv."
    )


def test_a_folder_of_one_data_set_and_of_splits(tmp_path: Path) -> None:
    one, two = (datasets.Dataset.from_dict({"n": numbers}) for numbers in ([1, 2], [3]))
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "both"))
    assert rows_of(open_folder(tmp_path / "one", "one", "train"))[1] == ({"n": 2}, "one:2")
    assert rows_of(open_folder(tmp_path / "both", "both", "test")) == [({"n": 3}, "both:1")]
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path / "both", "both", "eval")
    assert str(caught.value) == (
        "both has the splits train, test, not 'eval'; expected one of them. Set the source's split."
    )


def test_the_digest_of_a_folder_is_that_of_its_content(tmp_path: Path) -> None:
    digests = []
    for name, numbers in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        datasets.Dataset.from_dict({"n": numbers}).save_to_disk(str(tmp_path / name))
        digests.append(digest_of_table(open_folder(tmp_path / name, name, "train")))
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_of_data_files_loads_like_a_hub_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    rows = open_hub(str(folder), None, "train", None, "data.train.0")
    assert [fields for fields, _ in rows_of(rows)] == [{"n": 1}, {"n": 2}]
    assert rows.origin(1) == f"{folder}[train]:2"


def test_a_data_set_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_hub("nobody/nothing-here", None, "train", None, "data.train.1")
    assert str(caught.value).startswith(
        "data.train.1.path 'nobody/nothing-here' is no file here, and `datasets` loads no such "
        "data set ("
    )
    assert str(caught.value).endswith(
        "expected a file, a folder, or the id, config and split of a hub data set. "
        "Correct data.train.1, download the data where there is a network, or set HF_TOKEN."
    )
