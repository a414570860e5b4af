"""Files as people have them: compressed, tabs, Arrow; and what is said of the others."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.prepared import make_config, pairs_of, report_of, write_jsonl

from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

ROWS = [{"prompt": f"say {n}", "chosen": f" yes\n{n}", "rejected": f" no, {n}"} for n in range(6)]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tabs(rows: list[dict[str, Any]]) -> bytes:
    table = [list(rows[0]), *(row.values() for row in rows)]
    quoted = (("\t".join(f'"{field}"' for field in line)) for line in table)
    return "\n".join(quoted).encode()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def digest_of(folder: Path, path: Path) -> str:
    folder.mkdir()
    return pairs_of(make_config(folder, train=[{"path": str(path)}])).digest


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl.gz", lambda: gzip.compress(lines(ROWS))),
        (".jsonl.zst", lambda: zstd(lines(ROWS))),
        (".json.bz2", lambda: bz2.compress(json.dumps(ROWS).encode())),
        (".csv.gz", lambda: gzip.compress(tabs(ROWS).replace(b"\t", b","))),
        (".tsv", lambda: tabs(ROWS)),
        (".tsv.gz", lambda: gzip.compress(tabs(ROWS))),
        (".arrow", lambda: arrow(ROWS)),
    ],
)
def test_the_pairs_are_those_of_a_plain_file(
    suffix: str, content: Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content())
    plain = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert digest_of(tmp_path / "one", path) == digest_of(tmp_path / "two", plain)
    pairs = pairs_of(make_config(tmp_path / "one", train=[{"path": str(path)}]))
    assert pairs.origin(0).startswith(f"{path}:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl", b"{'prompt': 'P', 'chosen': 'a', 'rejected': 'b'}\n",
            "{}:1 is not JSON (Expecting property name enclosed in double quotes, column 2); "
            "expected a JSON object. JSON has double quotes: write rows with json.dumps(row), not "
            "with str(row).",
        ),
        (
            "a.csv", b"prompt;chosen;rejected\nP;a;b\n",
            "{}:1 has one column, 'prompt;chosen;rejected'; expected columns divided by commas, or "
            "by tabs in a .tsv. They look divided by ';': convert the file, or rename it to .tsv "
            "for tabs.",
        ),
        (
            "a.jsonl.gz", b"no gzip",
            "{} is not readable as gzip (",
        ),
        (
            "a.arrow", b"no arrow at all, and long enough",
            "{} is not readable as an Arrow stream (",
        ),
        (
            "a.txt", b"x",
            "data.train.0.path {} ends in .txt; expected a file that ends in .jsonl, .ndjson, "
            ".json, .parquet, .csv, .tsv, .arrow, or one of them and .gz, .zst, .bz2. Rename or "
            "convert it.",
        ),
        (
            "a.jsonl", b'{"messages": [{"role": "user", "content": "Q"}], "label": true}\n',
            "{}:1 has the columns messages, label: one answer and a label, as for KTO; expected "
            "two answers to a prompt, chosen and rejected. Set data.train.0.format=labelled to "
            "pair good and bad answers to the same prompt.",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_others(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path)}]))
    assert str(caught.value).startswith(message.format(path))


def test_labelled_rows_may_be_whole_dialogues(tmp_path: Path) -> None:
    def row(answer: str, label: bool) -> dict[str, Any]:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "label": label}

    rows = [row("good", True), row("bad", False), row("more", True)]
    rows[2]["messages"] = rows[2]["messages"][:1]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"path": str(path), "format": "labelled"}
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[source]))
    assert str(caught.value).startswith(
        f"{path}:3: field 'messages' ends in no answer; expected a "
    )
    counts = report_of(make_config(tmp_path, train=[source], on_bad_row="drop", max_bad_rows=0.5))[
        "splits"
    ]["train"]
    assert (counts["pairs"], counts["dropped"]["bad_row"]) == (1, 1)
