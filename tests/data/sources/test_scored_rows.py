"""Rows of one answer and its score: joined by prompt, in files; a stream of them is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import make_config, pairs_of, report_of, write_jsonl

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.errors import DataError


def helpsteer(prompt: str, response: str, score: Any) -> dict[str, Any]:
    return {
        "prompt": prompt, "response": response, "helpfulness": score, "correctness": 3,
        "coherence": 4, "complexity": 1, "verbosity": 2,
    }  # fmt: skip


ROWS = [
    helpsteer("P", "p one", 2),
    helpsteer("P", "p two", 4),
    helpsteer("Q", "q one", 3),
    helpsteer("R", "r one", 1),
    helpsteer("Q", "q two", 3),
    helpsteer("P", "p three", 0),
]
JOINED = [
    ("P", ["p one", "p two", "p three"], [2, 4, 0], "1+2+6"),
    ("Q", ["q one", "q two"], [3, 3], "3+5"),
    ("R", ["r one"], [1], "4"),
]


def read(path: Path, **settings: Any) -> list[tuple[Any, ...]]:
    section = SourceSection.model_validate({"path": str(path), **settings})
    (source,) = open_sources([section], "train", path.parent)
    assert source.row_format == "ranked"
    return [
        (*(row.fields[name] for name in ("prompt", "responses", "scores")),
         row.origin.removeprefix(f"{path}:"))
        for row in source.rows.read(source.positions())  # pyright: ignore
    ]  # fmt: skip


def test_answers_are_joined_by_prompt(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == JOINED
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == JOINED
    assert read(tmp_path / "a.jsonl", limit=2) == [("P", ["p one", "p two"], [2, 4], "1+2")]


def test_the_score_is_the_column_that_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert read(path, columns={"score": "verbosity"})[0][2] == [2, 2, 2]


def test_prepared(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}])
    report = report_of(config)["splits"]["train"]
    assert (report["rows"], report["pairs"], report["dropped"]["no_preference"]) == (5, 3, 2)
    assert report["first"]["no_preference"] == f"{path}:3+5"
    assert {pairs_of(config).origin(index) for index in range(3)} == {f"{path}:1+2+6"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"helpfulness": "high"}, "field 'helpfulness' is 'high'; expected a number."),
        ({"helpfulness": None}, "field 'helpfulness' is null; expected text or messages."),
        ({"response": 5}, "field 'responses[0]' is a number; expected a list of messages."),
        ({"prompt": None}, "field 'prompt' is null; expected text or messages."),
    ],
)
def test_an_unusable_row_is_named_alone(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1] |= change
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        pairs_of(make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}]))
    assert str(caught.value) == (
        f"{path}:2: {message} Correct or remove the row. Or set data.on_bad_row=drop."
    )


def test_a_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    source = {"path": str(tmp_path / "data"), "streaming": True}
    with pytest.raises(DataError) as caught:
        open_sources([SourceSection.model_validate(source)], "train", tmp_path)
    assert str(caught.value) == (
        f"data.train.0.streaming is true, but {tmp_path}/data[train] has one answer and its score "
        "in each row; expected all answers to a prompt in one row, since a stream is read once and "
        "they may be anywhere in it. Set data.train.0.streaming=false, or join the rows by prompt "
        "beforehand."
    )
