"""The packed row: what it holds, what it scores, and its way back to plain sequences."""

from __future__ import annotations

import doctest
import random

import pytest
import torch

from dpo_dist.engine.forward import packing
from dpo_dist.engine.forward.packing import PairIds, pack_pairs, pad_pairs


def random_pairs(num_pairs: int, seed: int = 0) -> list[PairIds]:
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 100) for _ in range(rng.randrange(1, most))]

    return [(ids(12), ids(9), ids(9)) for _ in range(num_pairs)]


def test_worked_examples() -> None:
    results = doctest.testmod(packing)
    assert results.attempted >= 10 and results.failed == 0


@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_every_completion_token_is_scored_once_by_the_token_before_it(num_pairs: int) -> None:
    pairs = random_pairs(num_pairs)
    packed = pack_pairs(pairs)
    row, positions = packed.input_ids[0], packed.position_ids[0]
    lengths = packed.completion_lengths
    assert packed.num_pairs == num_pairs
    for index, (prompt, chosen, rejected) in enumerate(pairs):
        for completion, ids in ((2 * index, chosen), (2 * index + 1, rejected)):
            assert packed.targets.split(lengths)[completion].tolist() == list(ids)
            predictors = packed.score_positions.split(lengths)[completion]
            assert row[predictors].tolist() == [prompt[-1], *ids[:-1]]
            expected = list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))
            assert positions[predictors].tolist() == expected


def test_token_counts() -> None:
    pairs = random_pairs(5)
    packed = pack_pairs(pairs)
    assert packed.num_tokens == sum(len(p) + len(c) + len(r) for p, c, r in pairs)
    assert packed.num_tokens_unshared == sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    assert sum(packed.completion_lengths) == len(packed.targets) == len(packed.score_positions)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_part_is_a_mistake_of_the_caller(empty: int) -> None:
    pair: list[list[int]] = [[5, 6], [7], [8]]
    pair[empty] = []
    with pytest.raises(AssertionError, match="pair 1 has an empty part"):
        pack_pairs([([5], [6], [7]), (pair[0], pair[1], pair[2])])


def test_no_pairs_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="one pair at least"):
        pack_pairs([])


def test_padding_gives_the_plain_sequences_back() -> None:
    pairs = random_pairs(4, seed=1)
    packed = pack_pairs(pairs)
    padded = pad_pairs(packed)
    sequences = [[*prompt, *ids] for prompt, *both in pairs for ids in both]
    for row, mask, sequence in zip(padded.input_ids, padded.attention_mask, sequences, strict=True):
        assert row[: len(sequence)].tolist() == sequence
        assert row[len(sequence) :].eq(0).all()
        assert mask.tolist() == [1] * len(sequence) + [0] * (len(row) - len(sequence))
    flat = padded.input_ids.flatten()
    assert flat[padded.score_positions + 1].equal(packed.targets)


def test_to_moves_every_tensor_of_the_row() -> None:
    moved = pack_pairs(random_pairs(2)).to("meta")
    host = "scored_offsets"  # of which other positions are made
    tensors = [v for k, v in vars(moved).items() if isinstance(v, torch.Tensor) and k != host]
    assert len(tensors) == 4 and all(tensor.is_meta for tensor in tensors)
