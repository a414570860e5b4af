"""Pairs that share a prompt or an answer: how they are grouped, planned and ordered."""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from dpo_dist.data.batches import (
    epoch_permutation,
    plan_micro_batches,
    plan_scoring_batches,
    step_pair_indices,
)
from dpo_dist.data.shared_parts import SharedParts
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.reference.pair_key import answer_key, pair_key


def ranked_pairs(num_prompts: int, seed: int, most: int = 5) -> list[PairIds]:
    """All pairs of 2 to `most` answers to each prompt, in a random order."""
    chance = random.Random(seed)
    pairs: list[PairIds] = []
    for _ in range(num_prompts):
        prompt = [chance.randrange(3, 999) for _ in range(chance.randint(1, 60))]
        answers = [
            [chance.randrange(3, 999) for _ in range(chance.randint(1, 40))]
            for _ in range(chance.randint(2, most))
        ]
        pairs += [(prompt, one, other) for one, other in itertools.combinations(answers, 2)]
    chance.shuffle(pairs)
    return pairs


def shared_parts(pairs: list[PairIds]) -> SharedParts:
    keys = [(pair_key(p, [], []), answer_key(p, c), answer_key(p, r)) for p, c, r in pairs]
    numbers = np.array([[int.from_bytes(key[:8], "little") for key in row] for row in keys])
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    return SharedParts(len(pairs), numbers.astype(np.uint64).__getitem__, lengths.__getitem__)


def packed_lengths(shared: SharedParts) -> Any:
    return shared.lengths_of(np.arange(shared.num_pairs)).sum(axis=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("budget", [140, 400, 2000])
def test_a_plan_computes_what_pairs_share_once(world_size: int, budget: int) -> None:
    for seed in range(8):
        pairs = ranked_pairs(12, seed)
        shared = shared_parts(pairs)
        lengths = packed_lengths(shared)
        plan = plan_micro_batches(lengths, range(len(pairs)), world_size, budget, shared)
        assert len({len(batches) for batches in plan}) == 1, "ranks gather in lockstep"
        batches = [batch for on_rank in plan for batch in on_rank]
        counted = [pair for batch in batches if batch.counted for pair in batch.pair_indices]
        assert sorted(counted) == list(range(len(pairs)))
        rows = [pack_pairs([pairs[i] for i in batch.pair_indices]).num_tokens for batch in batches]
        assert max(rows) <= budget
        alone = plan_micro_batches(lengths, range(len(pairs)), world_size, budget)
        assert len(plan[0]) <= len(alone[0])
        if world_size == 1 and budget == 2000:
            assert sum(rows) == shared.tokens(np.arange(len(pairs))) < lengths.sum() / 2


def test_no_rank_waits_for_one_that_has_all_pairs_of_a_prompt() -> None:
    """The best of eight answers against the others, on two ranks: each takes about half."""
    prompt, answers = list(range(3, 53)), [[number] * 40 for number in range(100, 108)]
    pairs: list[PairIds] = [(prompt, answers[0], other) for other in answers[1:]]
    shared = shared_parts(pairs)
    plan = plan_micro_batches(packed_lengths(shared), range(7), 2, 4096, shared)
    rows = [pack_pairs([pairs[i] for i in batch.pair_indices]) for (batch,) in plan]
    assert all(batch.counted for (batch,) in plan)
    assert shared.tokens(np.arange(7)) == 50 + 8 * 40
    assert max(row.num_tokens for row in rows) == 50 + 5 * 40


def test_pairs_are_not_divided_where_every_part_would_be_the_whole() -> None:
    """All 28 pairs of eight answers on four ranks: seven of them have all answers, or nearly."""
    prompt, answers = list(range(3, 53)), [[number] * 20 for number in range(100, 108)]
    pairs: list[PairIds] = [
        (prompt, one, other) for one, other in itertools.combinations(answers, 2)
    ]
    shared = shared_parts(pairs)
    plan = plan_micro_batches(packed_lengths(shared), range(28), 4, 4096, shared)
    counted = [batch for (batch,) in plan if batch.counted]
    assert len(counted) == 1
    assert pack_pairs([pairs[i] for i in counted[0].pair_indices]).num_tokens == 50 + 8 * 20


def test_pairs_that_share_nothing_are_planned_as_without() -> None:
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 300, (200, 3))
    numbers = np.arange(600, dtype=np.uint64).reshape(200, 3)
    shared = SharedParts(200, numbers.__getitem__, lengths.__getitem__)
    for world_size in (1, 4):
        together = plan_micro_batches(lengths.sum(axis=1), range(200), world_size, 1024, shared)
        assert together == plan_micro_batches(lengths.sum(axis=1), range(200), world_size, 1024)
        waves = plan_scoring_batches(
            lengths.sum(axis=1), range(200), world_size, 1024, shared=shared
        )
        alone = plan_scoring_batches(lengths.sum(axis=1), range(200), world_size, 1024)
        assert list(waves) == list(alone)
    assert (shared.by_prompt(np.arange(200)) == np.arange(200)).all()


def test_an_epoch_of_prompts_keeps_their_pairs_together() -> None:
    pairs = ranked_pairs(40, 1)
    shared = shared_parts(pairs)
    orders = [epoch_permutation(len(pairs), 7, epoch, shared) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(pairs)))
        prompts = [prompt for prompt, _ in itertools.groupby(shared.prompts[order].tolist())]
        assert len(prompts) == len(set(prompts)) == 40
        for _, members in itertools.groupby(order.tolist(), key=shared.prompts.__getitem__):
            found = list(members)
            assert found == sorted(found)
    assert (orders[0] != orders[1]).any()
    steps = [step_pair_indices(step, len(pairs), 8, 7, shared) for step in range(20)]
    both = np.concatenate(orders)[: 8 * 20]
    assert np.concatenate(steps).tolist() == both.tolist()


def test_an_order_of_prompts_with_one_pair_each_is_that_of_pairs() -> None:
    numbers = np.arange(90, dtype=np.uint64).reshape(30, 3)
    shared = SharedParts(30, numbers.__getitem__, np.ones((30, 3), np.int64).__getitem__)
    for epoch in range(3):
        alone = epoch_permutation(30, 5, epoch)
        assert epoch_permutation(30, 5, epoch, shared).tolist() == alone.tolist()
