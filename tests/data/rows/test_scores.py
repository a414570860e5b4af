"""Scores columns and the smallest margin."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.prepared import make_config, orca_row, report_of, write_jsonl

from dpo_dist.data.rows.formats import score_margin
from dpo_dist.data.rows.row import Row
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

SCORES = [(9.0, 5.0), (7.3, 7.2), (6.0, 6.0), (4.0, 8.0)]


def scored_rows(chosen: str, rejected: str) -> list[dict[str, Any]]:
    return [orca_row(n) | {chosen: a, rejected: b} for n, (a, b) in enumerate(SCORES)]


def kept_of(folder: Path, source: dict[str, Any]) -> tuple[int, int]:
    counts = report_of(make_config(folder, train=[source], max_dropped=1.0))["splits"]["train"]
    return counts["pairs"], counts["dropped"]["low_margin"]


@pytest.mark.parametrize(
    ("least", "expected"), [(None, (4, 0)), (0, (3, 1)), (0.1, (2, 2)), (0.2, (1, 3)), (-9, (4, 0))]
)
@pytest.mark.parametrize("names", [("chosen_score", "rejected_score"), ("good", "bad")])
def test_pairs_below_the_margin_are_dropped(
    tmp_path: Path, least: float | None, expected: tuple[int, int], names: tuple[str, str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", scored_rows(*names))
    columns = {} if names[0] != "good" else {"chosen_score": "good", "rejected_score": "bad"}
    source = {"path": str(path), "min_score_margin": least, "columns": columns}
    assert kept_of(tmp_path, source) == expected


def test_ultrafeedbacks_names_are_known_and_csv_has_its_numbers_as_text(tmp_path: Path) -> None:
    rows = scored_rows("score_chosen", "score_rejected")
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    source = {"path": str(tmp_path / "a.csv"), "min_score_margin": 0.1}
    assert kept_of(tmp_path, source) == (2, 2)


def test_the_margin_is_each_sources_own_and_is_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", scored_rows("score_chosen", "score_rejected"))
    other = [row | {"question": f"b {n}"} for n, row in enumerate(scored_rows("x", "y"))]
    write_jsonl(tmp_path / "b.jsonl", other)
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "min_score_margin": 1},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    report = report_of(make_config(tmp_path, train=sources, max_dropped=1.0))["splits"]["train"]
    dropped = {n: c["dropped"]["low_margin"] for n, c in report["sources"].items()}
    assert dropped == {"a": 3, "b": 0}
    assert report["first"]["low_margin"] == f"{tmp_path}/a.jsonl:2"
    margins = report["histograms"]["score_margin"]
    assert list(margins["counts"]) == ["a"] and sum(margins["counts"]["a"]) == 4


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"chosen_score": "high"}, "field 'chosen_score' is 'high'; expected a number. Correct"),
        ({"chosen_score": None}, "field 'chosen_score' is null; expected a number. Correct"),
        ({"rejected_score": True}, "field 'rejected_score' is a boolean; expected a number."),
        ({"rejected_score": float("nan")}, "field 'rejected_score' is nan; expected a number."),
    ],
)
def test_an_unusable_score(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    rows = scored_rows("chosen_score", "rejected_score")
    rows[1] |= change
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path), "min_score_margin": 0}]))
    assert str(caught.value).startswith(f"{path}:2: {found}")
    # nobody asked for scores: the row has none
    assert score_margin(Row(rows[1], "x:1"), required=False) is None


def test_a_margin_without_scores(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [orca_row(0)])
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path), "min_score_margin": 0}]))
    assert str(caught.value) == (
        f"{path}:1 has no field 'chosen_score' (it has system, question, chosen, rejected); "
        "expected "
        "a field 'chosen_score' in every row. Correct or remove the row, or map the column with "
        "`columns`. Or set data.on_bad_row=drop."
    )


def test_all_below_the_margin(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", json.loads(json.dumps(scored_rows("x", "y"))))
    columns = {"chosen_score": "x", "rejected_score": "y"}
    source = {"path": str(path), "min_score_margin": 99, "columns": columns}
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[source]))
    assert str(caught.value) == (
        "no train pair is left of 4 rows (4 because the scores are closer than the source's "
        "min_score_margin, or the other way round, the first is "
        f"{path}:1); expected at least one pair. Lower min_score_margin of the source."
    )
