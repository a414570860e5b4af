"""The packed row: what it holds, what it scores, and its way back to plain sequences."""

from __future__ import annotations

import doctest
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.data.batches import MicroBatch
from dpo_dist.engine.forward import packing, padding
from dpo_dist.engine.forward.packing import PairIds, pack_ahead, pack_pairs, upload
from dpo_dist.engine.forward.padding import pad_pairs, unpack_sequences
from dpo_dist.objective.pair_logps import Terms


def random_pairs(num_pairs: int, seed: int = 0) -> list[PairIds]:
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 100) for _ in range(rng.randrange(1, most))]

    return [(ids(12), ids(9), ids(9)) for _ in range(num_pairs)]


def packed_by_token(pairs: Sequence[PairIds], terms: Terms) -> dict[str, list[int]]:
    """The tensors of a packed row, one token after the other."""
    row, places, scored, targets, offsets = [], [], [], [], []
    of_prompts: list[tuple[int, int]] = []  # what predicts a token, and the token
    for prompt, *both in pairs:
        first = len(row)
        of_prompts += [(first + at - 1, prompt[at]) for at in range(1, len(prompt))]
        row += prompt
        places += range(len(prompt))
        for ids in both:
            start = len(row)
            for at, token in enumerate(ids):
                if token >= 0:
                    scored.append(start + at - 1 if at else first + len(prompt) - 1)
                    targets.append(token)
                    offsets.append(at)
                row.append(token if token >= 0 else ~token)
                places.append(len(prompt) + at)
    asked = of_prompts if terms.prompt else []
    return {
        "input_ids": row,
        "position_ids": places,
        "score_positions": scored + [at for at, _ in asked],
        "targets": targets + [token for _, token in asked],
        "scored_offsets": offsets,
    }


@pytest.mark.parametrize("terms", [Terms(), Terms(prompt=True)], ids=["answers", "prompts too"])
@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.int32)])
@pytest.mark.parametrize("num_pairs", [1, 2, 7, 40])
def test_the_row_is_what_a_walk_over_the_tokens_makes(
    num_pairs: int, kind: Callable[[list[int]], Any], terms: Terms
) -> None:
    """Of answers of one turn, and of several, in which some tokens are only read."""
    rng = random.Random(num_pairs)

    def part_read(ids: Sequence[int]) -> list[int]:
        marked = [~token if rng.random() < 0.4 else token for token in ids]
        kept = rng.randrange(len(ids))
        return [*marked[:kept], ids[kept], *marked[kept + 1 :]]

    several = [(p, part_read(c), part_read(r)) for p, c, r in random_pairs(num_pairs)]
    for pairs in (random_pairs(num_pairs), several):
        of_kind: Any = [tuple(map(kind, pair)) for pair in pairs]
        packed = pack_pairs(of_kind, terms=terms, shared=False)
        for name, expected in packed_by_token(pairs, terms).items():
            found = getattr(packed, name)
            assert found.dtype == torch.int64 and found.is_contiguous()
            assert found.flatten().tolist() == expected, name
        assert packed.input_ids.shape == packed.position_ids.shape == (1, packed.num_tokens)
        assert packed.part_lengths == [[len(ids) for ids in pair] for pair in pairs]
        scored = [sum(token >= 0 for token in ids) for _, *both in pairs for ids in both]
        assert packed.scored_lengths == tuple(scored)
        assert all(type(length) is int for length in packed.scored_lengths)


@pytest.mark.parametrize("terms", [Terms(), Terms(prompt=True)], ids=["answers", "prompts too"])
@pytest.mark.parametrize("num_pairs", [1, 2, 7, 40])
def test_what_pairs_share_is_packed_once(num_pairs: int, terms: Terms) -> None:
    """Prompts and answers drawn from a few, so that pairs repeat them in any order."""
    rng = random.Random(num_pairs)
    prompts = [[5], [5, 6], [7, 8, 9]]
    answers = [[3], [3, ~4, 2], [6, 6], [8, ~2]]
    pairs: list[tuple[list[int], list[int], list[int]]] = []
    for _ in range(num_pairs):
        chosen, rejected = rng.sample(answers, 2)
        pairs.append((rng.choice(prompts), chosen, rejected))
    packed = pack_pairs(pairs, terms=terms)
    alone = pack_pairs(pairs, terms=terms, shared=False)
    distinct = {(tuple(prompt), tuple(ids)) for prompt, *both in pairs for ids in both}
    tokens = sum(len(ids) for ids in {tuple(prompt) for prompt, _, _ in pairs})
    assert packed.num_tokens == tokens + sum(len(ids) for _, ids in distinct)
    assert packed.num_tokens_unshared == alone.num_tokens_unshared
    assert packed.lengths.tolist() == alone.lengths.tolist()
    assert packed.is_merged == (len(distinct) < 2 * num_pairs) and not alone.is_merged
    targets = packed.targets.split(packed.target_lengths)
    row, places = packed.input_ids[0], packed.position_ids[0]
    before = packed.score_positions.split(packed.target_lengths)
    sequences, group_of = unpack_sequences(packed), packed.group_of
    for (prompt, *both), pair in zip(pairs, packed.pairs, strict=True):
        for ids, answer in zip(both, pair, strict=True):
            plain = [*prompt, *(token if token >= 0 else ~token for token in ids)]
            assert sequences[answer].tolist() == plain
            scored = [at for at, token in enumerate(ids) if token >= 0]
            assert targets[answer].tolist() == [ids[at] for at in scored]
            predictors = [len(prompt) + at - 1 for at in scored]
            assert places[before[answer]].tolist() == predictors
            assert row[before[answer]].tolist() == [plain[at] for at in predictors]
        if terms.prompt:
            own = targets[len(packed.answer_lengths) + group_of[pair[0]]]
            assert own.tolist() == prompt[1:]


def test_ids_that_are_no_integers_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="float64"):
        pack_pairs([([5.5], [6], [7])])  # pyright: ignore[reportArgumentType]


def test_worked_examples() -> None:
    for module, examples in ((packing, 6), (padding, 4)):
        results = doctest.testmod(module)
        assert results.attempted >= examples and results.failed == 0


@pytest.mark.parametrize("num_pairs", [1, 2, 7])
def test_every_completion_token_is_scored_once_by_the_token_before_it(num_pairs: int) -> None:
    pairs = random_pairs(num_pairs)
    packed = pack_pairs(pairs)
    row, positions = packed.input_ids[0], packed.position_ids[0]
    lengths = packed.scored_lengths
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
    assert sum(packed.scored_lengths) == len(packed.targets) == len(packed.score_positions)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_part_is_a_mistake_of_the_caller(empty: int) -> None:
    pair: list[list[int]] = [[5, 6], [7], [8]]
    pair[empty] = []
    with pytest.raises(AssertionError, match="pair 1 has an empty part"):
        pack_pairs([([5], [6], [7]), (pair[0], pair[1], pair[2])])


def test_a_pair_of_nothing_and_one_with_nothing_to_score() -> None:
    with pytest.raises(AssertionError, match=r"pair 0 has .* nothing to score: \(0, 0, 0\)"):
        pack_pairs([([], [], [])])
    with pytest.raises(AssertionError, match=r"pair 1 has .* nothing to score: \(1, 1, 0\)"):
        pack_pairs([([5], [6], [7]), ([5], [6], [~7, ~8])])


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


def test_micro_batches_are_packed_ahead_in_their_order() -> None:
    pairs = random_pairs(6)
    batches = [MicroBatch((4, 1), True), MicroBatch((0,), True), MicroBatch((3, 5, 2), False)]
    readers: set[bool] = set()

    def token_ids(index: int) -> PairIds:
        readers.add(threading.current_thread() is threading.main_thread())
        return pairs[index]

    with pack_ahead(batches, token_ids, torch.device("cpu"), Terms(prompt=True)) as rows:
        for batch, packed in zip(batches, rows, strict=True):
            expected = pack_pairs([pairs[i] for i in batch.pair_indices], terms=Terms(prompt=True))
            assert vars(packed).keys() == vars(expected).keys()
            for name, value in vars(expected).items():
                found = getattr(packed, name)
                assert found.equal(value) if isinstance(value, torch.Tensor) else found == value
    assert readers == {False}


def test_a_copy_to_cuda_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        done.append("pinned")
        return tensor

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool) -> torch.Tensor:
        done.append((str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in ("cuda", torch.device("cuda", 1), "cpu"):
        upload(torch.ones(2), device)
    assert done == ["pinned", ("cuda", True), "pinned", ("cuda:1", True), ("cpu", True)]


def test_to_moves_every_tensor_of_the_row() -> None:
    moved = pack_pairs(random_pairs(2)).to("meta")
    host = {"scored_offsets", "score_places"}  # of which other positions are made
    tensors = [v for k, v in vars(moved).items() if isinstance(v, torch.Tensor) and k not in host]
    assert len(tensors) == 4 and all(tensor.is_meta for tensor in tensors)
