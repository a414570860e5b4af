"""Opening sources: every kind of file, selection of rows, names, and what an error says."""

import json
import pickle
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.rows.formats import read_pair, rename_columns
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.sources.sources import Source, count_copies, digest_of_source, open_sources
from dpo_dist.errors import DataError

ROWS = [{"prompt": f"p{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]


def section(path: Path | str, **settings: object) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), **settings})


def write_jsonl(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder: Path, *sections: SourceSection) -> list[Source]:
    return open_sources(sections, "train", folder)


def prompts_of(source: Source) -> list[str]:
    return [row.fields["prompt"] for row in source.rows.read(source.positions())]


def error_of(folder: Path, *sections: SourceSection) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, *sections)
    return str(caught.value)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    paths = [write_jsonl(tmp_path / "a.jsonl")]
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    pq.write_table(table, tmp_path / "d.parquet")
    lines = ["prompt,chosen,rejected", *(",".join(row.values()) for row in ROWS)]
    (tmp_path / "e.csv").write_text("\n".join(lines) + "\n")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "f"))
    paths += [tmp_path / name for name in ("b.json", "c.json", "d.parquet", "e.csv", "f")]
    sources = opened(tmp_path, *map(section, paths))
    for source in sources:
        assert prompts_of(source) == ["p0", "p1", "p2", "p3"], source.rows.label
        assert source.row_format == "standard"
        # processes get their sources pickled
        assert prompts_of(pickle.loads(pickle.dumps(source))) == prompts_of(source)
    assert [source.name for source in sources] == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize(
    ("weight", "copies"),
    [
        (1.0, [1, 1, 1, 1, 1, 1]),
        (0.5, [1, 0, 1, 0, 1, 0]),
        (0.34, [1, 0, 1, 0, 0, 1]),
        (2.0, [2, 2, 2, 2, 2, 2]),
        (1.5, [2, 1, 2, 1, 2, 1]),
        (0.1, [1, 0, 0, 0, 0, 0]),
    ],
)
def test_weight(weight: float, copies: list[int]) -> None:
    assert count_copies(range(6), weight).tolist() == copies
    assert count_copies(range(4), weight).tolist() == copies[:4]  # whatever follows


@pytest.mark.parametrize("weight", [0.29, 0.7, 1 / 3, 1.1, 2.9])
def test_weights_take_their_share_of_many_rows(weight: float) -> None:
    copies = count_copies(range(100), weight)
    assert copies.sum() == np.ceil(round(weight * 100, 6))
    assert copies.max() - copies.min() <= 1
    assert np.diff(np.flatnonzero(copies)).max(initial=0) <= np.ceil(1 / weight)


def test_limit_and_weight_of_every_kind_of_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "c"))
    paths = (write_jsonl(tmp_path / "a.jsonl"), tmp_path / "b.parquet", tmp_path / "c")
    for path in paths:
        for limit, expected in ((None, ["p0", "p2"]), (2, ["p0"]), (99, ["p0", "p2"])):
            (source,) = opened(tmp_path, section(path, limit=limit, weight=0.5))
            assert prompts_of(source) == expected, (path, limit)


def test_names_are_made_distinct(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "x" / "a.jsonl")
    names = [s.name for s in opened(tmp_path, *map(section, (first, second, second)))]
    assert names == ["a", "a-2", "a-3"]
    assert opened(tmp_path, section(first, name="mine"))[0].name == "mine"


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl")
    assert digest_of_source(section(first), "k") == digest_of_source(section(second), "k")
    write_jsonl(second, ROWS[:3])
    assert digest_of_source(section(first), "k") != digest_of_source(section(second), "k")


def test_a_named_format_and_a_column_map(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "?", "good": "a", "bad": "b"}])
    columns = {"question": "q", "chosen": "good", "rejected": "bad"}
    assert opened(tmp_path, section(path, columns=columns))[0].row_format == "orca"
    plain = write_jsonl(tmp_path / "b.jsonl")
    assert opened(tmp_path, section(plain, format="hh"))[0].row_format == "hh"


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    assert error_of(tmp_path, section(tmp_path / "trian.jsonl")) == (
        f"data.train.0.path {tmp_path}/trian.jsonl does not exist; expected a file, folder or hub "
        f"id. Did you mean {tmp_path}/train.jsonl?"
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, section(tmp_path / "no" / "rows.jsonl")).endswith(
        f"The folder {tmp_path}/no does not exist either."
    )


def test_a_missing_relative_file_says_relative_to_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(tmp_path, section("rows.jsonl")) == (
        "data.train.0.path rows.jsonl does not exist; expected a file, folder or hub id. "
        f"Correct it; paths are relative to {tmp_path}."
    )


def test_an_unknown_suffix(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.txt")
    assert error_of(tmp_path, section(path)) == (
        f"data.train.0.path {path} ends in .txt; expected a file that ends in .jsonl, .ndjson, "
        ".json, .parquet, .csv, .tsv, .arrow, or one of them and .gz, .zst, .bz2. Rename or "
        "convert it."
    )


@pytest.mark.fault(23, "0 rows in a source", becomes="refused, the source named")
def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    assert error_of(tmp_path, section(path)) == (
        f"data.train.0: {path} has no rows; expected preference rows. Fill it."
    )


def test_a_misspelled_column_of_ours(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl")
    assert error_of(tmp_path, section(path), section(path, columns={"promt": "p"})) == (
        "data.train.1.columns has 'promt'; expected one of prompt, chosen, rejected, system, "
        "question, response_j, response_k, tools, chosen_score, rejected_score, completion, label, "
        "chat_template_kwargs, responses, scores, ranks, response, score. Did you mean prompt?"
    )


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("rows.jsonl")  # cannot be opened, not even by root
        assert error_of(tmp_path, section("rows.jsonl")) == (
            "data.train.0.path rows.jsonl is not readable (No such device or address); expected a "
            "readable file. Check its permissions, and the space left in run.dir."
        )


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_a_dialogue_under_another_trainers_name_is_the_prompt(tmp_path: Path, name: str) -> None:
    said = [{"from": "human", "value": "Q"}]
    good, bad = ({"from": "gpt", "value": text} for text in "AB")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({name: said, "chosen": good, "rejected": bad}) + "\n")
    (source,) = opened(tmp_path, section(path))
    assert (source.row_format, source.columns) == ("conversational", {"prompt": name})
    (row,) = source.rows.read([0])
    pair = read_pair(rename_columns(row, source.columns), source.row_format, "source")
    assert isinstance(pair, Pair)
    assert (pair.prompt, pair.chosen) == (
        [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "A"}],
    )  # fmt: skip
