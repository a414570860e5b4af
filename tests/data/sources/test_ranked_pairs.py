"""Rows of several answers through `prepare`: what is counted, split, screened, streamed, kept."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import make_config, make_model, pairs_of, report_of, write_jsonl
from test_ranked_rows import CHOICES, PAIRS, plain, ultrafeedback

from dpo_dist.config.data_section import PairChoice
from dpo_dist.errors import ArtifactError, DataError
from dpo_dist.stages import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which one is all tied, one has one answer, and one is close."""
    folder = tmp_path_factory.mktemp("ranked")
    make_model(folder)
    rows = [
        *(plain(f"question {number}", [5, 9, 1, 7]) for number in range(8)),
        plain("tied", [3, 3]),
        plain("alone", [3]),
        plain("close", [3, 3.5]),
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def config_of(folder: Path, name: str, source: dict[str, Any] | None = None, **data: Any) -> Any:
    train = [{"path": str(folder / "rows.jsonl"), "min_score_margin": 1} | (source or {})]
    config = make_config(folder, train=train, **{"max_dropped": 0.9, "num_workers": 1} | data)
    run = config.run.model_copy(update={"dir": folder / name})
    return config.model_copy(update={"run": run})


@pytest.mark.parametrize("choice", CHOICES)
def test_prepared_pairs_and_rows_that_make_none_are_counted(
    folder: Path, choice: PairChoice
) -> None:
    config = config_of(folder, choice, {"pairs": choice})
    report, pairs = report_of(config)["splits"]["train"], pairs_of(config)
    dropped = {name: count for name, count in report["dropped"].items() if count}
    made = 8 * len(PAIRS[choice])
    assert dropped == {"no_preference": 2, "low_margin": 1}
    assert (report["rows"], report["pairs"], len(pairs)) == (made + 3, made, made)
    assert report["sources"]["rows"]["format"] == "ranked"
    path = folder / "rows.jsonl"
    assert report["first"]["no_preference"] == f"{path}:9"
    assert report["first"]["low_margin"] == f"{path}:11"
    lines = Counter(pairs.origin(index) for index in range(made))
    assert lines == {f"{path}:{line}": len(PAIRS[choice]) for line in range(1, 9)}


def test_limit_weight_and_held_out_prompts(folder: Path) -> None:
    chosen = {"pairs": "all", "limit": 4, "weight": 2}
    assert len(pairs_of(config_of(folder, "weighted", chosen))) == 4 * 6 * 2
    thinned = pairs_of(config_of(folder, "thinned", {"pairs": "all", "limit": 4, "weight": 0.5}))
    assert {thinned.origin(index)[-2:] for index in range(len(thinned))} == {":1", ":3"}
    assert len(thinned) == 12
    config = config_of(folder, "held", {"pairs": "all"}, eval_fraction=0.5)
    sides = [pairs_of(config, split) for split in ("train", "eval")]
    lines = [Counter(side.origin(index) for index in range(len(side))) for side in sides]
    assert not lines[0].keys() & lines[1].keys() and len(lines[0]) + len(lines[1]) == 8
    assert {*lines[0].values(), *lines[1].values()} == {6}


def test_duplicates_and_conflicts_are_found_between_pairs_of_rows(tmp_path: Path) -> None:
    rows = [plain("Q", [9, 5, 1]), plain("Q", [9, 5, 1]), plain("Q", [9, 1, 5])]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}], max_dropped=0.9)
    report = report_of(config)["splits"]["train"]
    dropped = {name: count for name, count in report["dropped"].items() if count}
    # 1 > 2 and 2 > 1 contradict each other in all three rows; the others repeat the first row's
    assert dropped == {"conflict": 3, "duplicate": 4} and report["pairs"] == 2


def test_a_bad_row_counts_once(tmp_path: Path) -> None:
    rows = [plain(f"question {number}", [5, 9, 1, 7]) for number in range(4)]
    rows[2]["tools"] = "{"  # of every pair
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"path": str(path), "pairs": "all"}
    bad = {"on_bad_row": "drop", "max_bad_rows": 0.25}
    report = report_of(make_config(tmp_path, train=[source], **bad))["splits"]["train"]
    assert report["dropped"]["bad_row"] == 1 and report["pairs"] == 3 * 6
    (other := tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"data.max_bad_rows = 24.00% of 4 rows"):
        prepare.run(make_config(other, train=[source], **bad | {"max_bad_rows": 0.24}))


def test_parquet_and_a_stream_give_what_json_lines_give(folder: Path) -> None:
    rows = [
        *(ultrafeedback(f"question {number}", [5, 9, 1, 7]) for number in range(4)),
        ultrafeedback("more", [1, 2]),
    ]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train.parquet")
    write_jsonl(folder / "uf.jsonl", rows)
    sources = [
        {"path": str(folder / "uf.jsonl")},
        {"path": str(folder / "data" / "train.parquet")},
        {"path": str(folder / "data"), "streaming": True},
    ]
    digests = {
        pairs_of(config_of(folder, f"kind{number}", source | {"pairs": "adjacent"})).digest
        for number, source in enumerate(sources)
    }
    assert len(digests) == 1


def test_pairs_made_before_the_key_came_stay_current(folder: Path) -> None:
    config = config_of(folder, "earlier")
    manifest = prepare.run(config) / "MANIFEST.json"
    assert "pairs" not in json.loads(manifest.read_text())["settings"]["train"]["0"]
    with pytest.raises(ArtifactError, match='train.0.pairs: null -> "all"'):
        prepare.run(config_of(folder, "earlier", {"pairs": "all"}))


def test_a_preview_shows_as_many_pairs_as_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.preview(config_of(folder, "preview", {"pairs": "all", "min_score_margin": None}), 3)
    shown = capsys.readouterr().out
    assert shown.count(f"rows, ranked, {folder}/rows.jsonl:1\n") == 3
    assert shown.count("chosen, ") == 3


def test_pairs_of_rows_that_are_pairs_already(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}]))
    assert str(caught.value) == (
        f"data.train.0.pairs is all, but {path} has two answers in each row; expected rows of "
        "several answers, with a score or a rank for each. Remove data.train.0.pairs."
    )
