"""Columns of tokenized rows: what is kept in memory, and truncation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from support.token_rows import columns_of

from dpo_dist.data.drop_reasons import NOTE_BITS, TRUNCATED
from dpo_dist.data.screening.data_report import split_report
from dpo_dist.data.screening.tokenized_rows import read_scratch, truncate
from dpo_dist.reference.pair_key import as_key_array, pair_key

ROWS = [
    ([1, 2], [3, 4, 5], [6]),
    ([1], [2], [3, 4]),
    ([1, 2, 3, 4], [5], [6]),
    ([1, 2, 3, 4, 5], [6], [7]),
    ([9], [1, ~2, 3, 4], [1, ~2, ~3, 5]),
]


def test_columns_are_those_of_the_batches(tmp_path: Path) -> None:
    columns, scratch_path = columns_of(tmp_path, ROWS, {1: "template"}, batch_rows=2)
    assert columns.prompt_lengths.tolist() == [2, 1, 4, 5, 1]
    assert columns.chosen_lengths.tolist() == [3, 1, 1, 1, 4]
    assert columns.rejected_lengths.tolist() == [1, 2, 1, 1, 4]
    assert columns.chosen_scored.tolist() == [3, 1, 1, 1, 3]
    assert columns.rejected_scored.tolist() == [1, 2, 1, 1, 2]
    assert columns.longest.tolist() == [5, 3, 5, 6, 5]
    assert columns.position.tolist() == [0, 1, 2, 3, 4]
    assert columns.origin(3) == f"{tmp_path}/rows.jsonl:4"
    assert columns.details == {"template": ["rows.jsonl:2: no system role"]}
    assert (columns.pair_keys == as_key_array([pair_key(*row) for row in ROWS])).all()
    written = [row for batch in read_scratch(scratch_path) for row in batch.to_pylist()]
    assert [row["chosen_ids"] for row in written] == [row[1] for row in ROWS]


@pytest.mark.parametrize("max_length", range(1, 8))
def test_truncation_is_that_of_lists(tmp_path: Path, max_length: int) -> None:
    columns, scratch_path = columns_of(tmp_path, ROWS, batch_rows=2)
    cut = truncate(columns, scratch_path, max_length)
    for index, (prompt, chosen, rejected) in enumerate(ROWS):
        room = max(max_length - len(prompt), 0)
        short = prompt, chosen[:room], rejected[:room]
        lengths = [len(chosen[:room]), len(rejected[:room])]
        assert [cut.chosen_lengths[index], cut.rejected_lengths[index]] == lengths
        assert cut.prompt_lengths[index] == len(prompt)
        swapped = short[0], short[2], short[1]
        keys = as_key_array([pair_key(*short), pair_key(*swapped)])
        found = itertools.chain(cut.pair_keys[[index]], cut.swapped_keys[[index]])
        assert list(found) == list(keys)
        is_cut = lengths != [len(chosen), len(rejected)]
        assert bool(cut.notes[index] & NOTE_BITS[TRUNCATED]) == is_cut
        scored = [sum(token >= 0 for token in ids) for ids in short[1:]]
        assert [cut.chosen_scored[index], cut.rejected_scored[index]] == scored
    # the columns from before the cut are unchanged: the gate compares the two
    assert columns.chosen_lengths.tolist() == [len(row[1]) for row in ROWS]
    assert (columns.pair_keys == as_key_array([pair_key(*row) for row in ROWS])).all()
    assert not np.any(columns.notes)


def test_lengths_of_answers_count_what_is_scored(tmp_path: Path) -> None:
    rows = [([1, 2], [3, ~4, ~5, ~6], [7, 8]), ([1], [2, ~3, 4], [5])]
    report = split_report(columns_of(tmp_path, rows)[0])
    assert report["lengths"]["chosen"] == {"p50": 1, "p90": 2, "p99": 2, "max": 2}
    assert report["lengths"]["rejected"] == {"p50": 1, "p90": 2, "p99": 2, "max": 2}
    assert report["lengths"]["prompt + chosen + rejected"]["max"] == 8, "what is read counts here"
    assert report["tokens"] == 8 + 5
    bias = report["length_bias"]
    assert (bias["chosen_longer"], bias["rejected_longer"]) == (0.5, 0.5)
    assert (bias["mean_chosen"], bias["mean_rejected"]) == (1.5, 1.5)
    assert report["histograms"]["answers"]["counts"]["chosen"] == [0, 1, 1]
