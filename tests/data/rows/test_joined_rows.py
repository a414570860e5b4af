"""Patterns as a source: which files, in which order, and where a row of one lies."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import make_config, pairs_of, write_jsonl

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.rows.joined_rows import JoinedRows
from dpo_dist.data.sources.sources import Source, digest_of_source, open_sources
from dpo_dist.errors import DataError
from dpo_dist.report.model_card import _front_matter
from dpo_dist.stages import prepare


def rows_from(first: int, count: int = 2) -> list[dict[str, Any]]:
    numbers = range(first, first + count)
    return [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in numbers]


def opened(pattern: Path | str, scratch: Path, **settings: Any) -> Source:
    section = SourceSection.model_validate({"path": str(pattern), **settings})
    scratch.mkdir(exist_ok=True)
    (source,) = open_sources([section], "train", scratch)
    return source


def error_of(pattern: Path | str, scratch: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(pattern, scratch, **settings)
    return str(caught.value)


def prompts(source: Source) -> list[str]:
    return [row.fields["prompt"] for row in source.rows.read(source.positions())]


def shards(folder: Path) -> Path:
    """Three files of two rows, two rows and none, written in another order than read."""
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", rows_from(2))
    write_jsonl(folder / "c.jsonl", [])
    write_jsonl(folder / "a.jsonl", rows_from(0))
    return folder


def test_the_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    source = opened(folder / "*.jsonl", tmp_path / "scratch")
    assert isinstance(source.rows, JoinedRows)
    assert prompts(source) == ["say 0", "say 1", "say 2", "say 3"]
    assert [row.origin for row in source.rows.read([3, 0, 2])] == [
        f"{folder}/b.jsonl:2", f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1",
    ]  # fmt: skip
    assert [source.rows.origin(row) for row in range(4)][1:3] == [
        f"{folder}/a.jsonl:2", f"{folder}/b.jsonl:1",
    ]  # fmt: skip
    assert (source.name, source.row_format) == ("data", "standard")


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "csv"])
def test_every_kind_of_file_below_a_folder(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "data" / f"part{number}" / f"rows.{kind}"
        path.parent.mkdir(parents=True)
        rows = rows_from(2 * number)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif kind == "csv":
            lines = [",".join(row) for row in ([*rows[0]], *(row.values() for row in rows))]
            path.write_text("\n".join(lines))
        else:
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    pattern = tmp_path / "data" / "**" / f"*.{kind}"
    source = opened(pattern, tmp_path / "scratch")
    assert prompts(source) == [f"say {n}" for n in range(6)]
    line = 3 if kind == "csv" else 2  # behind the header
    assert source.rows.origin(5) == f"{tmp_path}/data/part2/rows.{kind}:{line}"
    assert source.name == "data"
    assert prompts(opened(pattern, tmp_path / "scratch", limit=3)) == ["say 0", "say 1", "say 2"]
    assert prompts(opened(pattern, tmp_path / "scratch", weight=0.5)) == ["say 0", "say 2", "say 4"]


def test_pairs_are_those_of_one_file_and_other_bytes_are_other_data(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    one = write_jsonl(tmp_path / "one.jsonl", rows_from(0, 4))
    digests = []
    for name, path in (("x", folder / "*.jsonl"), ("y", one)):
        (tmp_path / name).mkdir()
        digests.append(pairs_of(make_config(tmp_path / name, train=[{"path": str(path)}])).digest)
    assert digests[0] == digests[1]
    section = SourceSection.model_validate({"path": str(folder / "*.jsonl")})
    before = digest_of_source(section, "k")
    write_jsonl(folder / "c.jsonl", rows_from(9))
    assert digest_of_source(section, "k") != before


def test_a_bad_row_is_named_by_its_own_file(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    write_jsonl(folder / "b.jsonl", [*rows_from(2), {"prompt": "say", "chosen": 3}])
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(folder / "*.jsonl")}]))
    assert str(caught.value).startswith(f"{folder}/b.jsonl:3: field 'chosen' is a number")


def test_answers_in_two_files_are_paired_and_both_are_named(tmp_path: Path) -> None:
    for name, labels in (("a", [True, False]), ("b", [False, True])):
        rows = [
            {"prompt": f"say {n}", "completion": name, "label": label}
            for n, label in enumerate(labels)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    source = opened(tmp_path / "*.jsonl", tmp_path / "scratch", format="labelled")
    assert [source.rows.origin(row) for row in range(len(source.positions()))] == [
        f"{tmp_path}/a.jsonl:1+{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2+{tmp_path}/a.jsonl:2",
    ]  # fmt: skip


def test_a_pattern_that_matches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(tmp_path / "no" / "*.jsonl", tmp_path) == (
        f"data.train.0.path {tmp_path}/no/*.jsonl matches no file; expected a pattern of data "
        f"files. The folder {tmp_path}/no does not exist."
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    assert error_of("*.jsonl", tmp_path) == (
        "data.train.0.path *.jsonl matches no file; expected a pattern of data files. Correct it; "
        f"paths are relative to {tmp_path}."
    )


def test_files_of_several_kinds(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    pq.write_table(pa.Table.from_pylist(rows_from(0)), folder / "d.parquet")
    assert error_of(folder / "*", tmp_path) == (
        f"data.train.0.path {folder}/* matches files of several kinds: {folder}/c.jsonl (json), "
        f"{folder}/d.parquet (parquet); expected files of one kind. Write a source for each kind, "
        "for example with the suffix in its pattern."
    )
    (folder / "d.parquet").rename(folder / "README.md")
    assert error_of(folder / "*", tmp_path).startswith(
        f"data.train.0.path {folder}/README.md ends in .md; expected a file that ends in .jsonl"
    )


def test_files_without_rows_and_streams(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [])
    assert error_of(tmp_path / "*.jsonl", tmp_path) == (
        f"data.train.0: {tmp_path}/*.jsonl has no rows; expected preference rows. Fill it."
    )
    assert error_of(tmp_path / "*.jsonl", tmp_path, streaming=True).startswith(
        f"data.train.0.streaming is true, but {tmp_path}/*.jsonl is a file or folder of this"
    )


def test_a_file_whose_name_has_brackets_is_itself(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows[1].jsonl", rows_from(0))
    write_jsonl(tmp_path / "rows1.jsonl", rows_from(4))
    source = opened(path, tmp_path / "scratch")
    assert prompts(source) == ["say 0", "say 1"] and source.name == "rows[1]"


def test_a_pattern_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    config = make_config(tmp_path, train=[{"path": "data/*.parquet"}, {"path": "org/name"}])
    assert _front_matter(config, "full", "base")["datasets"] == ["org/name"]
