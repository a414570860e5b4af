"""A micro-batch of preference pairs as one row in which every prompt and answer occurs once.

Shapes: B pairs of G prompts with A answers, T packed tokens, C scored tokens of answers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.data.ahead import one_ahead
from dpo_dist.data.batches import MicroBatch
from dpo_dist.objective.pair_logps import COMPLETIONS, Terms
from dpo_dist.reference.arrays import IntArray
from dpo_dist.reference.pair_key import Ids

# prompt, chosen, rejected; a completion's token that is read and not scored is written ~id
PairIds = tuple[Ids, Ids, Ids]


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host's tensor on the device, without waiting until the device has caught up.

    Through pinned memory, since CUDA may wait for the device to stage any other. The host's copy
    may be given up at once: torch keeps the pinned one until it has been read.
    """
    from_host = tensor.device.type == "cpu"
    if from_host and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=from_host)


@dataclass(frozen=True)
class PackedPairs:
    """The row `prompt | answer | answer | ...` of each group in turn, and where it is scored.

    A group is a prompt with its distinct answers; a pair is two answers of a group, by number.
    `score_positions[k]` is the place in the row whose hidden state predicts `targets[k]`. These
    follow the answers in their order. Where the terms ask for prompts, theirs come after all of
    them, without each first token.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    score_positions: Tensor  # (C,)
    targets: Tensor  # (C,)
    prompt_lengths: tuple[int, ...]  # G
    group_sizes: tuple[int, ...]  # G counts of answers
    answer_lengths: tuple[int, ...]  # A
    scored_lengths: tuple[int, ...]  # A counts of scored tokens
    pairs: tuple[tuple[int, int], ...]  # B of (chosen, rejected), the numbers of answers
    scored_offsets: Tensor  # (C,) place of each answer's target in it; stays on the host
    score_places: Tensor  # (C,) the score positions once more; stay on the host
    terms: Terms = COMPLETIONS  # what is to be summed over the tokens of a pair

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    @property
    def is_merged(self) -> bool:
        """Whether a prompt or an answer belongs to several pairs."""
        return 2 * self.num_pairs != len(self.answer_lengths)

    @property
    def lengths(self) -> Tensor:  # (B, 2)
        """Tokens of chosen and of rejected that are scored, int64."""
        counts = [[self.scored_lengths[answer] for answer in pair] for pair in self.pairs]
        return torch.tensor(counts, device=self.input_ids.device)

    @property
    def target_lengths(self) -> tuple[int, ...]:
        """How the targets divide: `scored_lengths`, then G of prompts if these are scored."""
        prompts = (length - 1 for length in self.prompt_lengths if self.terms.prompt)
        return (*self.scored_lengths, *prompts)

    @property
    def num_tokens(self) -> int:
        """T: tokens of the row."""
        return self.input_ids.shape[1]

    @property
    def group_of(self) -> list[int]:
        """Of each answer the group that it belongs to, (A,)."""
        return [group for group, size in enumerate(self.group_sizes) for _ in range(size)]

    @property
    def part_lengths(self) -> list[list[int]]:
        """G lists of the prompt's tokens, and of each answer's, as they lie in the row."""
        answers = iter(self.answer_lengths)
        groups = zip(self.prompt_lengths, self.group_sizes, strict=True)
        return [[prompt, *itertools.islice(answers, size)] for prompt, size in groups]

    @property
    def num_scored(self) -> int:
        """C, and prompt tokens where these are scored: rows that reach the output head."""
        return len(self.targets)

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens of the same pairs as two sequences each, without any padding."""
        group_of = self.group_of
        sequences = [
            self.prompt_lengths[group_of[answer]] + length
            for answer, length in enumerate(self.answer_lengths)
        ]
        return sum(sequences[answer] for pair in self.pairs for answer in pair)

    def to(self, device: torch.device | str) -> PackedPairs:
        return replace(
            self,
            input_ids=upload(self.input_ids, device),
            position_ids=upload(self.position_ids, device),
            score_positions=upload(self.score_positions, device),
            targets=upload(self.targets, device),
        )


def pack_pairs(
    pairs: Sequence[PairIds],
    device: torch.device | str = "cpu",
    terms: Terms = COMPLETIONS,
    *,
    shared: bool = True,
) -> PackedPairs:
    """Pack (prompt_ids, chosen_ids, rejected_ids) of B pairs into one row.

    Pairs with the same prompt share it, and an answer that several of them have: each is computed
    once. With `shared` off every pair stands alone. Every token of chosen_ids and rejected_ids is
    scored but those written `~id`, which are read only: what a tool or a user says between the
    turns of an answer. The last token of the prompt predicts the first one of each. So a prompt
    needs one token at least, and so does either completion, one that is scored.

    >>> packed = pack_pairs([([5, 6, 7], [8, 9], [4]), ([5], [9], [8, 4])])
    >>> packed.input_ids.tolist()  # prompt | chosen | rejected, twice
    [[5, 6, 7, 8, 9, 4, 5, 9, 8, 4]]
    >>> packed.position_ids.tolist()  # rejected starts again behind its prompt
    [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    >>> packed.targets.tolist(), packed.score_positions.tolist()  # token 2 predicts both 8 and 4
    ([8, 9, 4, 9, 8, 4], [2, 3, 2, 6, 6, 8])
    >>> pack_pairs([([5, 6, 7], [8, ~9, ~2, 3], [4])]).targets.tolist()
    [8, 3, 4]
    >>> packed = pack_pairs([([5, 6], [8], [9, 4]), ([5, 6], [8], [7])])  # three answers
    >>> packed.input_ids.tolist(), packed.pairs
    ([[5, 6, 8, 9, 4, 7]], ((0, 1), (0, 2)))
    """
    assert pairs, "expected one pair at least, found none"
    parts, sizes, numbers = _parts(pairs, shared)
    lengths = np.array([len(ids) for ids in parts])  # of prompts and answers as they lie in the row
    row = np.concatenate(parts, dtype=np.int64)  # (T,)
    ends = lengths.cumsum()
    part = np.repeat(np.arange(len(parts)), lengths)  # (T,) as the two below
    place = np.arange(len(row)) - (ends - lengths)[part]  # of a token in its part
    prompts = np.cumsum([0, *(1 + size for size in sizes[:-1])])  # (G,) which parts are prompts
    is_prompt = np.isin(np.arange(len(parts)), prompts)
    in_prompt = is_prompt[part]
    scored = np.flatnonzero((row >= 0) & ~in_prompt)  # (C,) where the targets stand in the row
    counts = np.bincount(part[scored], minlength=len(parts))[~is_prompt]  # (A,)
    prompt_of = np.repeat(prompts, [1 + size for size in sizes])  # of a part, its own of a prompt
    _check_parts(lengths[prompt_of[~is_prompt]], counts, numbers)
    num_prompt = lengths[prompt_of]
    before = np.where(place[scored] > 0, scored - 1, ends[prompt_of[part[scored]]] - 1)
    of_prompt = np.flatnonzero(in_prompt & (place > 0)) if terms.prompt else scored[:0]
    score_places = torch.from_numpy(np.concatenate([before, of_prompt - 1]))
    return PackedPairs(
        input_ids=torch.from_numpy(np.where((row < 0) & ~in_prompt, ~row, row))[None],
        position_ids=torch.from_numpy(np.where(in_prompt, place, place + num_prompt[part]))[None],
        score_positions=score_places,
        targets=torch.from_numpy(row[np.concatenate([scored, of_prompt])]),
        prompt_lengths=tuple(lengths[prompts].tolist()),
        group_sizes=tuple(sizes),
        answer_lengths=tuple(lengths[~is_prompt].tolist()),
        scored_lengths=tuple(counts.tolist()),
        pairs=tuple(numbers),
        scored_offsets=torch.from_numpy(place[scored]),
        score_places=score_places,
        terms=terms,
    ).to(device)


def _parts(
    pairs: Sequence[PairIds], shared: bool
) -> tuple[list[npt.NDArray[Any]], list[int], list[tuple[int, int]]]:
    """Distinct prompts, each before its distinct answers; how many these are for each prompt; and
    the numbers of the two answers of each pair among all answers."""
    groups: dict[Any, tuple[npt.NDArray[Any], dict[Any, npt.NDArray[Any]]]] = {}
    places: list[tuple[Any, list[Any]]] = []  # of each pair: its group and its answers, by content
    for index, pair in enumerate(pairs):
        # an empty list is one of floats to numpy, and floats are refused
        prompt, *both = (np.asarray(ids, dtype=None if len(ids) else np.int64) for ids in pair)
        name = prompt.tobytes() if shared else index
        answers = groups.setdefault(name, (prompt, {}))[1]
        names = [ids.tobytes() if shared else side for side, ids in enumerate(both)]
        for answer, ids in zip(names, both, strict=True):
            answers.setdefault(answer, ids)
        places.append((name, names))
    numbers: dict[Any, dict[Any, int]] = {}
    count = itertools.count()
    for name, (_, answers) in groups.items():
        numbers[name] = {answer: next(count) for answer in answers}
    parts = [part for prompt, answers in groups.values() for part in (prompt, *answers.values())]
    sizes = [len(answers) for _, answers in groups.values()]
    return parts, sizes, [(numbers[name][a], numbers[name][b]) for name, (a, b) in places]


def _check_parts(
    num_prompt: IntArray, num_scored: IntArray, pairs: Sequence[tuple[int, int]]
) -> None:
    """Both are (A,): tokens of an answer's prompt, and how many of its own are scored."""
    if min(num_prompt.min(), num_scored.min()) > 0:
        return
    for index, (chosen, rejected) in enumerate(pairs):
        counts = (int(num_prompt[chosen]), int(num_scored[chosen]), int(num_scored[rejected]))
        assert min(counts) > 0, f"pair {index} has an empty part or nothing to score: {counts}"


@contextlib.contextmanager
def pack_ahead(
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], PairIds],
    device: torch.device,
    terms: Terms = COMPLETIONS,
    *,
    shared: bool = True,
) -> Iterator[Iterator[PackedPairs]]:
    """The packed rows of micro-batches, in their order, each on the device; as `pack_pairs`.

    While one is in use the host reads and packs the next in a thread, which ends with the block.
    Raises what `token_ids` raises where the row of that micro-batch is asked for.
    """
    rows = (
        pack_pairs([token_ids(index) for index in batch.pair_indices], terms=terms, shared=shared)
        for batch in micro_batches
    )
    with one_ahead(rows) as packed:
        yield (row.to(device) for row in packed)
