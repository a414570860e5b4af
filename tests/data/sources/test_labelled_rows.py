"""Rows of one answer and a label: refused with a word on what is needed, or paired when asked."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import make_config, pairs_of, report_of, write_jsonl

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.rows.row import Row
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

REAL_DATA = os.environ.get("DPO_DIST_REAL_DATA")
ROWS: list[dict[str, Any]] = [
    {"prompt": "P", "completion": " g1", "label": True},
    {"prompt": "Q", "completion": " b1", "label": False},
    {"prompt": "P", "completion": " g2", "label": True},
    {"prompt": "P", "completion": " b2", "label": False},
    {"prompt": "R", "completion": " g3", "label": True},
    {"prompt": "P", "completion": " b3", "label": False},
    {"prompt": "P", "completion": " b4", "label": False},
    {"prompt": "Q", "completion": " g4", "label": True},
]
PAIRS = [
    ("P", " g1", " b2", "1+4"), ("Q", " g4", " b1", "8+2"), ("P", " g2", " b3", "3+6"),
    (None, None, None, "5"), (None, None, None, "7"),
]  # fmt: skip


def read(path: Path, **settings: Any) -> list[tuple[Any, ...]]:
    section = SourceSection.model_validate({"path": str(path), "format": "labelled", **settings})
    (source,) = open_sources([section], "train", path.parent)
    return [
        (*(row.fields.get(name) for name in ("prompt", "chosen", "rejected")),
         row.origin.removeprefix(f"{path}:"))
        for row in map(Row.sound, source.rows.read(source.positions()))  # pyright: ignore
    ]  # fmt: skip


def test_good_and_bad_answers_are_paired_in_order(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == PAIRS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == PAIRS


@pytest.mark.parametrize("labels", [(1, 0), ("True", "False"), (1.0, 0.0)])
def test_labels_of_other_types(tmp_path: Path, labels: tuple[Any, Any]) -> None:
    rows = [row | {"label": labels[not row["label"]]} for row in ROWS]
    assert read(write_jsonl(tmp_path / "a.jsonl", rows)) == PAIRS


def test_limit_and_columns(tmp_path: Path) -> None:
    names = {"prompt": "q", "completion": "answer", "label": "good"}
    rows = [{names[name]: value for name, value in row.items()} for row in ROWS]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(path, columns=names, limit=4) == [
        ("P", " g1", " b2", "1+4"), (None, None, None, "2"), (None, None, None, "3")
    ]  # fmt: skip


def test_conversations_and_questions(tmp_path: Path) -> None:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": turn("user", "P"), "completion": turn("assistant", text), "label": label}
        for text, label in (("yes", True), ("no", False))
    ]
    asked = [
        {"system": "", "question": "P", "completion": text, "label": label}
        for text, label in (("no", False), ("yes", True))
    ]
    digests = []
    for name, made in (("a", rows), ("b", asked)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", made)
        source = {"path": str(tmp_path / name / "x.jsonl"), "format": "labelled"}
        digests.append(pairs_of(make_config(tmp_path / name, train=[source])).digest)
    assert digests[0] == digests[1]


def test_rows_without_a_partner_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = {"path": str(path), "format": "labelled"}
    config = make_config(tmp_path, train=[source])
    counts = report_of(config)["splits"]["train"]
    assert (counts["rows"], counts["pairs"], counts["dropped"]["unpaired"]) == (5, 3, 2)
    assert counts["first"]["unpaired"] == f"{path}:5"
    assert pairs_of(config).origin(1) == f"{path}:8+2"


def test_unasked_they_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path)}]))
    assert str(caught.value) == (
        f"{path}:1 has the columns prompt, completion, label: one answer and a label, as for KTO; "
        "expected two answers to a prompt, chosen and rejected. Set "
        "data.train.0.format=labelled to "
        "pair good and bad answers to the same prompt."
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "P", "completion": "a", "label": "good"},
            "{}:9: field 'label' is 'good'; expected true or false. Correct or remove the row.",
        ),
        (
            {"prompt": "", "completion": "a", "label": True},
            "{}:9: field 'prompt' is empty; expected a prompt to find the partner by. Correct or "
            "remove the row.",
        ),
        (
            {"prompt": "P", "label": True},
            "{}:9 has no field 'completion' (it has prompt, label); expected a field "
            "'completion' in "
            "every row. Correct or remove the row, or map the column with `columns`.",
        ),
    ],
)
def test_an_unusable_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, row])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == message.format(path)


def test_a_file_of_other_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "P", "answer": "a", "label": 1}])
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}:1 has the columns prompt, answer, label; expected prompt, completion and label, "
        "because the format is labelled. Map the file's names, for example "
        "data.train.0.columns={completion: answer}."
    )


@pytest.mark.skipif(REAL_DATA is None, reason="DPO_DIST_REAL_DATA is not set")
def test_real_pairs_taken_apart_are_found_again(tmp_path: Path) -> None:
    lines = (Path(str(REAL_DATA)) / "orca_dpo_pairs.jsonl").read_text().splitlines()
    rows = {json.loads(line)["question"]: json.loads(line) for line in lines}.values()
    apart = [
        {"system": row["system"], "question": row["question"], "completion": row[name],
         "label": name == "chosen"}
        for row in rows for name in ("chosen", "rejected")
    ]  # fmt: skip
    random.Random(0).shuffle(apart)
    section = SourceSection(path=str(write_jsonl(tmp_path / "a.jsonl", apart)), format="labelled")  # pyright: ignore
    (source,) = open_sources([section], "train", tmp_path)
    assert source.row_format == "orca"
    found = {row.fields["question"]: row.fields for row in source.rows.read(source.positions())}  # pyright: ignore
    assert found == {row["question"]: dict(row) for row in rows}
