"""Streams: the rows a file would give, read once; what an error says. See also test_hub.py."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.prepared import make_config, orca_row, pairs_of, report_of, write_jsonl

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.rows.stream_rows import StreamRows
from dpo_dist.data.screening.tokenizer_pool import make_chunks
from dpo_dist.data.sources.sources import Source, digest_of_source, open_sources
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

NUM_ROWS = 40


def shards(folder: Path) -> Path:
    """A data set of two files, as a hub data set has them."""
    path = folder / "shards"
    path.mkdir()
    rows = [orca_row(number) for number in range(NUM_ROWS)]
    write_jsonl(path / "train-0.jsonl", rows[:25])
    write_jsonl(path / "train-1.jsonl", rows[25:])
    return path


def opened(folder: Path, path: Path, **settings: Any) -> Source:
    section = SourceSection.model_validate({"path": str(path), "streaming": True, **settings})
    return open_sources([section], "train", folder)[0]


def taken(source: Source) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for chunk in make_chunks([source]):
        assert chunk.streamed is not None
        questions = [row.fields["question"] for row in chunk.streamed]
        found += zip(chunk.positions, questions, strict=True)
    return found


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, list(range(NUM_ROWS))),
        ({"limit": 27}, list(range(27))),
        ({"limit": 99}, list(range(NUM_ROWS))),
        ({"limit": 7, "weight": 0.5}, [0, 2, 4, 6]),
    ],
)
def test_a_stream_takes_the_rows_a_file_would(
    tmp_path: Path, settings: dict[str, Any], positions: list[int]
) -> None:
    source = opened(tmp_path, shards(tmp_path), **settings)
    assert isinstance(source.rows, StreamRows)
    assert taken(source) == [(n, orca_row(n)["question"]) for n in positions]


def test_a_mixture_of_a_stream_and_a_file(tmp_path: Path) -> None:
    path, file = shards(tmp_path), write_jsonl(tmp_path / "b.jsonl", [orca_row(77), orca_row(0)])
    digests, reports = [], []
    for number, streaming in enumerate((True, False)):
        sources = [{"path": str(path), "streaming": streaming, "weight": 2}, {"path": str(file)}]
        config = make_config(tmp_path, train=sources, eval_fraction=0.25)
        run = config.run.model_copy(update={"dir": tmp_path / f"out{number}"})
        config = config.model_copy(update={"run": run})
        digests.append(pairs_of(config).digest)
        reports.append(report_of(config)["splits"]["train"]["sources"])
    assert digests[0] == digests[1] and reports[0] == reports[1]
    scratch = [p for p in (tmp_path / "out0").rglob("*") if p.suffix == ".arrow"]
    assert {p.parent.name for p in scratch} == {"train", "eval"}  # the pairs, and no rows


def test_media_in_a_stream_are_refused_and_not_decoded(tmp_path: Path) -> None:
    rows = [orca_row(number) | {"image": {"bytes": b"no image", "path": None}} for number in (0, 1)]
    table = datasets.Dataset.from_list(rows)
    features = datasets.Features({**table.features, "image": datasets.Image()})
    (tmp_path / "shards").mkdir()
    table.cast(features).to_parquet(tmp_path / "shards" / "train-0.parquet")
    source = {"path": str(tmp_path / "shards"), "streaming": True}
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[source]))
    assert "[train]:1: field 'image' holds media; expected text only" in str(caught.value)


def test_the_preview_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": str(shards(tmp_path)), "streaming": True}
    prepare.preview(make_config(tmp_path, train=[source]), 2)
    assert capsys.readouterr().out.count("prompt, ") == 2


def test_the_digest_is_of_the_files(tmp_path: Path) -> None:
    path = shards(tmp_path)
    section = SourceSection.model_validate({"path": str(path), "streaming": True})
    before = digest_of_source(section, "k")
    write_jsonl(path / "train-1.jsonl", [orca_row(1)])
    assert digest_of_source(section, "k") != before


def test_a_damaged_file_in_mid_stream_is_placed(tmp_path: Path) -> None:
    path = shards(tmp_path)
    (path / "train-1.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n{"qu')
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path), "streaming": True}]))
    found = str(caught.value)
    # at the first row of the damaged file or at its damaged one, as `datasets` happens to read it
    assert re.match(rf"{re.escape(str(path))}\[train\]:2[67]: the stream broke off \(", found)
    assert found.endswith(
        "expected rows to the end, or to the limit. Run `dpo-dist prepare` again, or set a limit "
        "below this row."
    )


def test_a_file_is_not_streamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [json.loads(json.dumps(orca_row(0)))])
    with pytest.raises(DataError) as caught:
        opened(tmp_path, path)
    assert str(caught.value) == (
        f"data.train.0.streaming is true, but {path} is a file or folder of this machine; "
        "expected a "
        "hub data set, or a folder of data files. Remove streaming: such rows are read where they "
        "lie."
    )
