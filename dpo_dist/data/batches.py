"""Which pairs make a step, and how they are packed into micro-batches on the ranks.

1. `epoch_permutation` shuffles the pairs of an epoch from (seed, epoch) alone.
2. `step_pair_indices` cuts the concatenation of all epochs into steps of exactly
   `global_batch_size` pairs. A step may cross the end of an epoch: no pair is left out of one,
   and only the last, partial step of the whole run is dropped (`num_steps`).
3. `plan_micro_batches` packs the pairs of a step under the token budget: every rank gets the
   same number of micro-batches, because ZeRO-3 ranks gather parameters in lock-step.
4. `plan_scoring_batches` does the same in waves for a pass over many pairs.

Nothing here knows its own rank: every rank computes the whole plan and takes its entry.
A token count is that of the packed row: prompt + chosen + rejected, each once where pairs share it.
"""

import bisect
import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_dist.data.shared_parts import SharedParts, Unit, alone
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import IntArray
from dpo_dist.reference.sorted_rows import stable_order

Bin = list[int]  # positions in the list of units that is being packed


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that go through the model as one packed row.

    A micro-batch with `counted=False` repeats a short pair only to keep its rank in step: its
    loss has weight 0 and its metrics and scores are thrown away.
    """

    pair_indices: tuple[int, ...]
    counted: bool


Plan = list[list[MicroBatch]]  # [rank][micro_step]


@functools.lru_cache(maxsize=2)
def epoch_permutation(
    num_pairs: int, seed: int, epoch: int, together: SharedParts | None = None
) -> npt.NDArray[np.uint32]:
    """The order of the pairs in an epoch: (num_pairs,) read-only, a function of its arguments.

    The pairs are sorted by one raw 64-bit word each of a Philox generator with key (seed, epoch);
    with `together` it is a word a prompt, whose pairs follow each other as they are numbered.
    numpy promises that stream for ever, unlike `Generator.permutation`: a run can be resumed, or
    repeated, with another numpy.
    """
    numbers = np.arange(num_pairs) if together is None else together.prompts
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    words = generator.random_raw(int(numbers.max()) + 1)
    order = stable_order(words[numbers]).astype(np.uint32)  # kept by every rank
    order.flags.writeable = False
    return order


def num_steps(num_pairs: int, global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps of a run: floor(num_pairs * num_epochs / global_batch_size).

    Raises DataError when the pairs do not fill one global batch, or the run has no step.
    """
    if num_pairs < global_batch_size:
        raise DataError(
            f"{num_pairs} pairs",
            f"at least one global batch of {global_batch_size} pairs",
            f"Set train.global_batch_size to {num_pairs} or less, or add pairs.",
        )
    # round() because 0.29 * 100 is 28.999999999999996
    steps = round(num_pairs * num_epochs) // global_batch_size
    if steps == 0:
        raise DataError(
            f"{num_pairs} pairs * {num_epochs} epochs do not fill one optimizer step",
            f"at least one global batch of {global_batch_size} pairs",
            "Raise train.num_epochs or lower train.global_batch_size.",
        )
    return steps


def step_pair_indices(
    step: int,
    num_pairs: int,
    global_batch_size: int,
    seed: int,
    together: SharedParts | None = None,
) -> IntArray:
    """The (global_batch_size,) pairs of a step (counted from 0), whatever the number of ranks.

    They stand at positions [step * G, (step + 1) * G) of the epoch permutations laid end to end.
    A step that crosses into the next epoch can hold a pair twice, once for each epoch.
    """
    assert num_pairs > 0, f"num_pairs is {num_pairs}, expected at least 1"
    position, end = step * global_batch_size, (step + 1) * global_batch_size
    pieces: list[IntArray] = []
    while position < end:
        epoch, offset = divmod(position, num_pairs)
        order = epoch_permutation(num_pairs, seed, epoch, together)
        pieces.append(order[offset : offset + end - position].astype(np.int64))
        position += len(pieces[-1])
    return np.concatenate(pieces)


def with_last(batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Every micro-batch of a step, and whether it is the last."""
    for position, batch in enumerate(batches, start=1):
        yield batch, position == len(batches)


def check_token_budget(
    lengths: IntArray, pair_indices: Sequence[int] | IntArray, micro_batch_tokens: int
) -> None:
    """Raises DataError, naming the longest pair, when it does not fit a micro-batch alone."""
    pairs = np.asarray(pair_indices, dtype=np.int64)
    if len(pairs) == 0:
        return
    longest = int(pairs[np.argmax(lengths[pairs])])
    if lengths[longest] <= micro_batch_tokens:
        return
    raise DataError(
        f"pair {longest} has {lengths[longest]} tokens (prompt + chosen + rejected)",
        f"at most micro_batch_tokens = {micro_batch_tokens}",
        f"Set train.micro_batch_tokens (of the reference pass: reference.micro_batch_tokens) to "
        f"{lengths[longest]} or more, or lower data.max_length.",
    )


def plan_micro_batches(
    lengths: IntArray,
    pair_indices: Sequence[int] | IntArray,
    world_size: int,
    micro_batch_tokens: int,
    shared: SharedParts | None = None,
) -> Plan:
    """Packs pairs into equally many micro-batches on every rank: plan[rank][micro_step].

    Every entry of `pair_indices` appears in exactly one counted micro-batch, and none of them
    holds more than `micro_batch_tokens`; `lengths` are the packed tokens of every pair, indexed
    by pair. With `shared`, pairs of a prompt go together, and what they share counts once. Tokens
    are balanced over ranks and micro-steps. The plan is a function of the arguments. Raises
    DataError as `check_token_budget`.
    """
    pairs = np.asarray(pair_indices, dtype=np.int64)
    check_token_budget(lengths, pairs, micro_batch_tokens)
    if not len(pairs):
        return [[] for _ in range(world_size)]
    if shared is None:
        return _plan(lengths, pairs, alone(lengths[pairs]), world_size, micro_batch_tokens)[1]
    # A prompt's pairs on one rank are the least work, and may be more than a rank's share of it:
    # the others would wait. So both are tried.
    share = -(-shared.tokens(pairs) // world_size)
    plans = [
        _plan(lengths, pairs, shared.together(pairs, most), world_size, micro_batch_tokens)
        for most in sorted({micro_batch_tokens, min(share, micro_batch_tokens)}, reverse=True)
    ]
    return min(plans, key=lambda plan: plan[0])[1]


def _plan(
    lengths: IntArray, pairs: IntArray, units: list[Unit], world_size: int, micro_batch_tokens: int
) -> tuple[int, Plan]:
    """Packs units of pairs; beside the plan, the tokens of the fullest rank in each micro-step."""
    tokens = [size for _, size in units]
    # longest first; the position breaks ties so that the plan is deterministic
    order = sorted(range(len(units)), key=lambda position: (-tokens[position], position))
    fitted = _best_fit(order, tokens, micro_batch_tokens)
    num_bins = -(-len(fitted) // world_size) * world_size
    bins = _level(order, tokens, micro_batch_tokens, num_bins) or fitted
    sized = [
        (sum(tokens[unit] for unit in members), _micro_batch(pairs, units, members))
        for members in bins
    ]
    shortest = int(pairs[units[order[-1]][0][0]])
    filler = int(lengths[shortest]), MicroBatch((shortest,), counted=False)
    return _deal(sized + [filler] * (num_bins - len(bins)), world_size)


def _micro_batch(pairs: IntArray, units: list[Unit], members: Bin) -> MicroBatch:
    positions = [position for unit in members for position in units[unit][0]]
    return MicroBatch(tuple(pairs[positions].tolist()), counted=True)


def plan_scoring_batches(
    lengths: IntArray,
    pair_indices: Sequence[int] | IntArray,
    world_size: int,
    micro_batch_tokens: int,
    micro_batches_per_wave: int = 16,
    shared: SharedParts | None = None,
) -> Iterator[Plan]:
    """Cuts a pass over `pair_indices` into waves, each one a plan of `plan_micro_batches`.

    A wave is what the reference pass commits at once: about `micro_batches_per_wave` full
    micro-batches on every rank. It is planned when it is asked for. Raises DataError as
    `check_token_budget`, before the first wave.
    """
    pairs = np.asarray(pair_indices, dtype=np.int64)
    check_token_budget(lengths, pairs, micro_batch_tokens)
    wave_tokens = world_size * micro_batch_tokens * micro_batches_per_wave
    ends = np.cumsum(lengths[pairs])

    def waves() -> Iterator[Plan]:
        start, done = 0, 0
        while start < len(pairs):
            # at least one pair, though a pair never exceeds a wave
            stop = max(int(np.searchsorted(ends, done + wave_tokens, side="right")), start + 1)
            wave = pairs[start:stop]
            yield plan_micro_batches(lengths, wave, world_size, micro_batch_tokens, shared)
            start, done = stop, int(ends[stop - 1])

    return waves()


def _best_fit(order: list[int], tokens: list[int], capacity: int) -> list[Bin]:
    """Best-fit decreasing: few bins (at most 11/9 of the fewest + 1), filled unevenly."""
    bins: list[Bin] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for position in order:
        slot = bisect.bisect_left(free, (tokens[position], -1))
        if slot < len(free):
            left, chosen = free.pop(slot)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(position)
        bisect.insort(free, (left - tokens[position], chosen))
    return bins


def _level(order: list[int], tokens: list[int], capacity: int, num_bins: int) -> list[Bin] | None:
    """Longest first into the emptiest bin: even bins, or None when one would overflow."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    emptiest = [(0, index) for index in range(num_bins)]
    for position in order:
        used, index = heapq.heappop(emptiest)
        if used + tokens[position] > capacity:
            return None
        bins[index].append(position)
        heapq.heappush(emptiest, (used + tokens[position], index))
    return [members for members in bins if members]


def _deal(sized: list[tuple[int, MicroBatch]], world_size: int) -> tuple[int, Plan]:
    """Deals (tokens, micro-batch) to ranks; their number is a multiple of world_size.

    The ranks wait for the slowest in every micro-step, so neighbors in size go together, and
    the largest of them to the rank that has had least. First comes for how many tokens they wait.
    """
    sized = sorted(sized, key=lambda item: (-item[0], not item[1].counted, item[1].pair_indices))
    plan: Plan = [[] for _ in range(world_size)]
    loads = [0] * world_size
    fullest = 0
    for start in range(0, len(sized), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        micro_step = sized[start : start + world_size]
        fullest += micro_step[0][0]
        for rank, (size, micro_batch) in zip(ranks, micro_step, strict=True):
            plan[rank].append(micro_batch)
            loads[rank] += size
    return fullest, plan
