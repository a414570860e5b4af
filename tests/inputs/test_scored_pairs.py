"""Pairs beside their reference log-probs."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from dpo_dist.data.pairs import EARLIER_SCHEMA, SCHEMA, Pairs
from dpo_dist.inputs.scored_pairs import ScoredPairs
from dpo_dist.run.manifest import digest_of


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_the_digest_of_the_reference_is_what_older_checkpoints_hold(count: int) -> None:
    torch.manual_seed(0)
    reference = torch.randn(count, 2)
    scored = ScoredPairs(Pairs(SCHEMA.empty_table(), Path()), reference)
    assert scored.reference_digest == digest_of(reference.numpy().tobytes().hex())


def test_a_micro_batch_is_told_its_lengths_and_the_means_of_its_step() -> None:
    rows = [([1] * (1 + n), [2] * n + [~3] * (n % 2), [4] * (2 * n)) for n in range(64)]
    ids = [pa.array(column, pa.list_(pa.int32())) for column in zip(*rows, strict=True)]
    keys, names = pa.array([bytes(16)] * 64, pa.binary(16)), pa.array([""] * 64)
    pairs = Pairs(pa.table([*ids, keys, names, names], schema=EARLIER_SCHEMA), Path())
    scored = ScoredPairs(pairs, torch.zeros(64, 2))
    logps = scored.logps(torch.zeros(2, 2), (3, 8), step=[3, 8, 5])
    assert logps.chosen_lengths.tolist() == [3, 8]
    assert logps.rejected_lengths.tolist() == [6, 16]
    assert logps.prompt_lengths is not None and logps.prompt_lengths.tolist() == [4, 9]
    assert logps.mean_chosen_length == pytest.approx(16 / 3)
    assert logps.mean_sequence_length == pytest.approx(32 / 3)
