"""Properties of the batch plan, over seeded random cases."""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest

from dpo_dist.data import batches
from dpo_dist.data.batches import (
    MicroBatch,
    Plan,
    epoch_permutation,
    num_steps,
    plan_micro_batches,
    plan_scoring_batches,
    step_pair_indices,
)
from dpo_dist.errors import DataError

Planner = Callable[[np.ndarray, list[int], int, int], object]


def lognormal_lengths(rng: np.random.Generator, num_pairs: int) -> np.ndarray:
    """Packed token counts shaped like those of real preference sets: median 500, long tail."""
    return np.clip(rng.lognormal(6.2, 0.8, num_pairs), 3, 4096).astype(np.int64)


def tokens_of(micro_batch: MicroBatch, lengths: np.ndarray) -> int:
    return int(sum(lengths[pair] for pair in micro_batch.pair_indices))


def counted_pairs(plan: Plan) -> Counter[int]:
    micro_batches = chain.from_iterable(plan)
    return Counter(chain.from_iterable(m.pair_indices for m in micro_batches if m.counted))


def micro_step_tokens(plan: Plan, lengths: np.ndarray) -> list[list[int]]:
    return [[tokens_of(m, lengths) for m in micro_step] for micro_step in zip(*plan, strict=True)]


def step_tokens(plan: Plan, lengths: np.ndarray) -> int:
    """What a lock-step run waits for: the largest micro-batch of each micro-step."""
    return sum(max(tokens) for tokens in micro_step_tokens(plan, lengths))


def test_a_permutation_is_one_and_depends_on_seed_and_epoch() -> None:
    orders = [epoch_permutation(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == 4


def test_the_permutation_never_changes() -> None:
    # a resumed run continues this order: other numbers here mean broken checkpoints
    assert epoch_permutation(10, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert epoch_permutation(10, 42, 1).tolist() == [4, 9, 5, 3, 0, 2, 7, 1, 6, 8]


def test_the_permutation_is_the_stable_argsort_that_runs_began_with() -> None:
    for count, seed, epoch in ((1, 0, 0), (2, 5, 1), (1000, 42, 3), (50_000, 7, 2)):
        key = np.array([seed, epoch], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(count)
        expected = np.argsort(words, kind="stable")
        assert epoch_permutation(count, seed, epoch).tolist() == expected.tolist()
        steps = [step_pair_indices(step, count, 7, seed) for step in range(3)]
        assert all(step.dtype == np.int64 for step in steps)


def test_a_permutation_is_fair() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), epoch_permutation(5, 7, epoch)] += 1
    assert abs(counts / 2000 - 0.2).max() < 0.04  # four standard deviations


@pytest.mark.parametrize(("num_pairs", "batch", "epochs"), [(10, 4, 3), (8, 4, 2), (7, 7, 1)])
def test_steps_are_the_epochs_laid_end_to_end(num_pairs: int, batch: int, epochs: int) -> None:
    steps = num_steps(num_pairs, batch, epochs)
    assert steps == num_pairs * epochs // batch
    stream = np.concatenate([step_pair_indices(k, num_pairs, batch, 3) for k in range(steps)])
    orders = np.concatenate([epoch_permutation(num_pairs, 3, e) for e in range(epochs)])
    assert stream.tolist() == orders[: steps * batch].tolist()
    assert len(orders) - len(stream) < batch


def test_a_step_may_span_several_epochs() -> None:
    step = step_pair_indices(1, 3, 10, 0)
    assert step.shape == (10,) and max(Counter(step.tolist()).values()) == 4


def test_fractions_of_an_epoch_round_to_whole_pairs() -> None:
    assert num_steps(100, 1, 0.29) == 29  # 100 * 0.29 is 28.999999999999996


@pytest.mark.fault(23, "fewer pairs than one batch", becomes="refused with the key to set")
def test_too_few_pairs_say_what_to_set() -> None:
    with pytest.raises(DataError) as error:
        num_steps(7, 8, 1)
    assert str(error.value) == (
        "7 pairs; expected at least one global batch of 8 pairs. "
        "Set train.global_batch_size to 7 or less, or add pairs."
    )
    with pytest.raises(DataError) as error:
        num_steps(10, 8, 0.5)
    assert str(error.value) == (
        "10 pairs * 0.5 epochs do not fill one optimizer step; expected at least one global batch "
        "of 8 pairs. Raise train.num_epochs or lower train.global_batch_size."
    )


def test_properties_of_every_plan() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = lognormal_lengths(rng, 500)
        world_size = int(rng.integers(1, 9))
        pairs = rng.choice(500, size=int(rng.integers(1, 200)), replace=False)
        budget = int(lengths[pairs].max() * rng.uniform(1, 6))
        plan = plan_micro_batches(lengths, pairs, world_size, budget)

        assert len(plan) == world_size
        assert len({len(micro_batches) for micro_batches in plan}) == 1
        assert counted_pairs(plan) == Counter(pairs.tolist())
        for micro_batch in chain.from_iterable(plan):
            assert 0 < tokens_of(micro_batch, lengths) <= budget
        assert plan == plan_micro_batches(lengths, pairs.tolist(), world_size, budget)
        # ranks wait for each other: the micro-batches of a micro-step are neighbors in size
        steps = micro_step_tokens(plan, lengths)
        assert all(min(a) >= max(b) for a, b in zip(steps, steps[1:], strict=False))


def test_the_number_of_micro_batches_is_near_the_lower_bound() -> None:
    rng = np.random.default_rng(1)
    planned = bound = 0
    for _ in range(50):
        lengths = lognormal_lengths(rng, 256)
        plan = plan_micro_batches(lengths, range(256), 4, 8192)
        planned += len(plan[0])
        bound += -(-int(lengths.sum()) // (8192 * 4))
    assert bound <= planned <= 1.05 * bound


def test_tokens_are_balanced_over_ranks_and_micro_steps() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        lengths = lognormal_lengths(rng, 256)
        plan = plan_micro_batches(lengths, range(256), 4, 8192)
        loads = [sum(tokens_of(m, lengths) for m in micro_batches) for micro_batches in plan]
        assert max(loads) <= 1.05 * min(loads)
        assert step_tokens(plan, lengths) * 4 <= 1.02 * lengths.sum()


def test_the_rank_with_the_least_so_far_gets_the_largest_next() -> None:
    lengths = np.array([10, 9, 4, 3])
    plan = plan_micro_batches(lengths, range(4), 2, 10)
    assert [[tokens_of(m, lengths) for m in rank] for rank in plan] == [[10, 3], [9, 4]]


def test_a_tight_packing_that_leveling_misses_is_kept() -> None:
    # 6+4, 5+5 and 4+3+3 fill three bins of 10; longest first into the emptiest overflows one
    lengths = np.array([6, 5, 5, 4, 4, 3, 3])
    plan = plan_micro_batches(lengths, range(7), 1, 10)
    assert sorted(tokens_of(m, lengths) for m in plan[0]) == [10, 10, 10]


@pytest.mark.fault(24, "fewer pairs than ranks", becomes="filled up, and what fills does not count")
def test_fewer_pairs_than_ranks_are_filled_with_a_short_pair_that_does_not_count() -> None:
    lengths = np.array([50, 20, 30])
    plan = plan_micro_batches(lengths, [0, 1, 2], 5, 100)
    assert [len(micro_batches) for micro_batches in plan] == [1] * 5
    assert counted_pairs(plan) == Counter([0, 1, 2])
    fillers = [m for m in chain.from_iterable(plan) if not m.counted]
    assert fillers == [MicroBatch((1,), counted=False)] * 2


def test_a_pair_that_occurs_twice_in_a_step_counts_twice() -> None:
    plan = plan_micro_batches(np.array([10, 20, 30]), [1, 0, 1, 2], 2, 40)
    assert counted_pairs(plan) == Counter([1, 0, 1, 2])


def test_no_pairs_make_no_micro_batches() -> None:
    assert plan_micro_batches(np.array([10]), [], 2, 40) == [[], []]
    assert list(plan_scoring_batches(np.array([10]), [], 2, 40)) == []


@pytest.mark.parametrize("plan", [plan_micro_batches, plan_scoring_batches])
def test_a_pair_above_the_budget_is_named_with_the_value_needed(plan: Planner) -> None:
    with pytest.raises(DataError) as error:
        plan(np.array([10, 900, 1200, 20]), [3, 1, 2], 2, 500)
    assert str(error.value) == (
        "pair 2 has 1200 tokens (prompt + chosen + rejected); expected at most micro_batch_tokens "
        "= 500. Set train.micro_batch_tokens (of the reference pass: reference.micro_batch_tokens) "
        "to 1200 or more, or lower data.max_length."
    )


def test_a_long_pair_outside_the_step_does_not_matter() -> None:
    plan = plan_micro_batches(np.array([10, 9000]), [0], 1, 500)
    assert plan == [[MicroBatch((0,), counted=True)]]


def test_scoring_waves_cover_the_pairs_in_order() -> None:
    rng = np.random.default_rng(3)
    lengths = lognormal_lengths(rng, 3000)
    pairs = np.flatnonzero(rng.random(3000) < 0.7)
    waves = list(plan_scoring_batches(lengths, pairs, 3, 8192, micro_batches_per_wave=4))
    assert sum((counted_pairs(plan) for plan in waves), Counter()) == Counter(pairs.tolist())
    edges = [(min(counted_pairs(plan)), max(counted_pairs(plan))) for plan in waves]
    assert all(left[1] < right[0] for left, right in zip(edges, edges[1:], strict=False))
    for plan in waves:
        assert len({len(micro_batches) for micro_batches in plan}) == 1
        assert len(plan[0]) <= 5  # 4 full ones, and one where packing leaves gaps
    assert 1 < len(waves) <= -(-int(lengths[pairs].sum()) // (3 * 8192 * 4)) + 1


def planned_at_once(lengths: np.ndarray, pairs: np.ndarray, ranks: int, budget: int) -> list[Plan]:
    """The waves as they were planned before they were planned one by one."""
    ends, waves, start, done = np.cumsum(lengths[pairs]), list[Plan](), 0, 0
    while start < len(pairs):
        stop = max(int(np.searchsorted(ends, done + ranks * budget * 16, side="right")), start + 1)
        waves.append(plan_micro_batches(lengths, pairs[start:stop], ranks, budget))
        start, done = stop, int(ends[stop - 1])
    return waves


def test_waves_are_planned_when_they_are_asked_for_and_are_those_of_a_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[int] = []

    def counted(lengths: np.ndarray, pairs: np.ndarray, *others: Any) -> Plan:
        planned.append(len(pairs))
        return plan_micro_batches(lengths, pairs, *others)

    rng = np.random.default_rng(4)
    for _ in range(20):
        lengths = lognormal_lengths(rng, 2000)
        pairs = np.flatnonzero(rng.random(2000) < rng.random())
        ranks, budget = int(rng.integers(1, 4)), int(rng.integers(4096, 16384))
        expected = planned_at_once(lengths, pairs, ranks, budget)
        planned.clear()
        with monkeypatch.context() as patched:
            patched.setattr(batches, "plan_micro_batches", counted)
            waves = plan_scoring_batches(lengths, pairs, ranks, budget)
            assert planned == []
            for number, wave in enumerate(waves, start=1):
                assert len(planned) == number and wave == expected[number - 1]
        assert len(planned) == len(expected) and sum(planned) == len(pairs)
