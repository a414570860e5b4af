"""A micro-batch of preference pairs as one row of tokens in which every prompt occurs once.

Shapes: B pairs, T packed tokens, C completion tokens (chosen and rejected of every pair).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.ahead import one_ahead
from dpo_dist.data.batches import MicroBatch
from dpo_dist.objective.pair_logps import COMPLETIONS, Terms
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
    """The row `prompt | chosen | rejected` of each pair in turn, and where it is scored.

    `score_positions[k]` is the place in the row whose hidden state predicts `targets[k]`. The
    completions follow each other: chosen of pair 0, rejected of pair 0, chosen of pair 1, ...
    Where the terms ask for prompts, theirs come after all of them, without each first token.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    score_positions: Tensor  # (C,)
    targets: Tensor  # (C,)
    prompt_lengths: tuple[int, ...]  # B of each
    chosen_lengths: tuple[int, ...]
    rejected_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]  # 2B counts of scored tokens: chosen, rejected of each pair
    scored_offsets: Tensor  # (C,) place of each completion's target in it; stays on the host
    terms: Terms = COMPLETIONS  # what is to be summed over the tokens of a pair

    @property
    def num_pairs(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Tensor:  # (B, 2)
        """`completion_lengths` by pair, int64: tokens of chosen and of rejected that are scored."""
        return torch.tensor(self.completion_lengths, device=self.input_ids.device).view(-1, 2)

    @property
    def target_lengths(self) -> tuple[int, ...]:
        """How the targets divide: `completion_lengths`, then B of prompts if these are scored."""
        prompts = (length - 1 for length in self.prompt_lengths if self.terms.prompt)
        return (*self.completion_lengths, *prompts)

    @property
    def num_tokens(self) -> int:
        """T: tokens of the row."""
        return self.input_ids.shape[1]

    @property
    def pair_sizes(self) -> list[int]:
        """How these divide among the B pairs."""
        lengths = (self.prompt_lengths, self.chosen_lengths, self.rejected_lengths)
        return [sum(each) for each in zip(*lengths, strict=True)]

    @property
    def num_scored(self) -> int:
        """C, and prompt tokens where these are scored: rows that reach the output head."""
        return len(self.targets)

    @property
    def num_tokens_unshared(self) -> int:
        """Tokens of the same pairs as two sequences each, without any padding."""
        return self.num_tokens + sum(self.prompt_lengths)

    def to(self, device: torch.device | str) -> PackedPairs:
        return replace(
            self,
            input_ids=upload(self.input_ids, device),
            position_ids=upload(self.position_ids, device),
            score_positions=upload(self.score_positions, device),
            targets=upload(self.targets, device),
        )


def pack_pairs(
    pairs: Sequence[PairIds], device: torch.device | str = "cpu", terms: Terms = COMPLETIONS
) -> PackedPairs:
    """Pack (prompt_ids, chosen_ids, rejected_ids) of B pairs into one row.

    Every token of chosen_ids and rejected_ids is scored but those written `~id`, which are read
    only: what a tool or a user says between the turns of an answer. The last token of the prompt
    predicts the first one of both. So a prompt needs one token at least, and so does either
    completion, one that is scored.

    >>> packed = pack_pairs([([5, 6, 7], [8, 9], [4]), ([5], [9], [8, 4])])
    >>> packed.input_ids.tolist()  # prompt | chosen | rejected, twice
    [[5, 6, 7, 8, 9, 4, 5, 9, 8, 4]]
    >>> packed.position_ids.tolist()  # rejected starts again behind its prompt
    [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    >>> packed.targets.tolist()
    [8, 9, 4, 9, 8, 4]
    >>> packed.score_positions.tolist()  # token 2 predicts both 8 (chosen) and 4 (rejected)
    [2, 3, 2, 6, 6, 8]
    >>> packed.lengths.tolist(), packed.num_tokens, packed.num_tokens_unshared
    ([[2, 1], [1, 2]], 10, 14)
    >>> pack_pairs([([5, 6, 7], [8, ~9, ~2, 3], [4])]).targets.tolist()
    [8, 3, 4]
    """
    assert pairs, "expected one pair at least, found none"
    parts = [ids for p, c, r in pairs for ids in (p, c, r)]
    lengths = np.array([len(ids) for ids in parts])  # (3B,), as the parts lie in the row
    # an empty list is one of floats to numpy, and floats are refused
    arrays = [np.asarray(ids, dtype=None if len(ids) else np.int64) for ids in parts]
    row = np.concatenate(arrays, dtype=np.int64)  # (T,)
    starts = lengths.cumsum() - lengths
    part = np.repeat(np.arange(len(parts)), lengths)  # (T,) as the two below
    place = np.arange(len(row)) - starts[part]  # of a token in its part
    in_prompt = part % 3 == 0
    scored = np.flatnonzero((row >= 0) & ~in_prompt)  # (C,) where the targets stand in the row
    counts = np.bincount(part[scored], minlength=len(parts)).reshape(-1, 3)
    counts[:, 0] = lengths[::3]
    for index, count in enumerate(counts.tolist()):
        assert min(count) > 0, f"pair {index} has an empty part or nothing to score: {(*count,)}"
    num_prompt = np.repeat(lengths[::3], 3)  # (3B,) tokens of the prompt of a part's pair
    last_of_prompt = np.repeat(starts[::3], 3) + num_prompt - 1
    before = np.where(place[scored] > 0, scored - 1, last_of_prompt[part[scored]])
    of_prompt = np.flatnonzero(in_prompt & (place > 0)) if terms.prompt else scored[:0]
    packed = PackedPairs(
        input_ids=torch.from_numpy(np.where((row < 0) & ~in_prompt, ~row, row))[None],
        position_ids=torch.from_numpy(np.where(in_prompt, place, place + num_prompt[part]))[None],
        score_positions=torch.from_numpy(np.concatenate([before, of_prompt - 1])),
        targets=torch.from_numpy(row[np.concatenate([scored, of_prompt])]),
        prompt_lengths=tuple(lengths[::3].tolist()),
        chosen_lengths=tuple(lengths[1::3].tolist()),
        rejected_lengths=tuple(lengths[2::3].tolist()),
        completion_lengths=tuple(counts[:, 1:].ravel().tolist()),
        scored_offsets=torch.from_numpy(place[scored]),
        terms=terms,
    )
    return packed.to(device)


@contextlib.contextmanager
def pack_ahead(
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], PairIds],
    device: torch.device,
    terms: Terms = COMPLETIONS,
) -> Iterator[Iterator[PackedPairs]]:
    """The packed rows of micro-batches, in their order, each on the device.

    While one is in use the host reads and packs the next in a thread, which ends with the block.
    Raises what `token_ids` raises where the row of that micro-batch is asked for.
    """
    rows = (
        pack_pairs([token_ids(index) for index in batch.pair_indices], terms=terms)
        for batch in micro_batches
    )
    with one_ahead(rows) as packed:
        yield (row.to(device) for row in packed)


def unpack_sequences(packed: PackedPairs) -> list[Tensor]:
    """The 2B plain sequences: prompt + chosen, prompt + rejected of each pair in turn.

    >>> [ids.tolist() for ids in unpack_sequences(pack_pairs([([5, 6, 7], [8, 9], [4])]))]
    [[5, 6, 7, 8, 9], [5, 6, 7, 4]]
    """
    return _unpacked(packed.input_ids[0], packed)


def _unpacked(row: Tensor, packed: PackedPairs) -> list[Tensor]:
    """The 2B sequences that a (T,) row of the packed tokens is made of."""
    sizes = zip(packed.prompt_lengths, packed.chosen_lengths, packed.rejected_lengths, strict=True)
    parts = row.split([size for lengths in sizes for size in lengths])
    sequences: list[Tensor] = []
    for prompt, chosen, rejected in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        sequences += [torch.cat((prompt, chosen)), torch.cat((prompt, rejected))]
    return sequences


@dataclass(frozen=True)
class PaddedPairs:
    """The same pairs as 2B sequences, right-padded: row 2i is prompt + chosen of pair i."""

    input_ids: Tensor  # (2B, L)
    attention_mask: Tensor  # (2B, L), 1 on tokens, 0 on padding
    score_positions: (
        Tensor  # (C,), into the flattened (2B * L) positions; order of `packed.targets`
    )
    position_ids: Tensor  # (2B, L), 0 on padding


def pad_pairs(packed: PackedPairs) -> PaddedPairs:
    """Unpack into 2B right-padded sequences for a model that must not see two in one row.

    The padding comes after all that is scored, so in a causal model nothing flows back from it.

    >>> padded = pad_pairs(pack_pairs([([5, 6, 7], [8, 9], [4])]))
    >>> padded.input_ids.tolist()
    [[5, 6, 7, 8, 9], [5, 6, 7, 4, 0]]
    >>> padded.score_positions.tolist()
    [2, 3, 7]
    """
    device = packed.input_ids.device
    sequences = unpack_sequences(packed)
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    input_ids = pad_sequence(sequences, batch_first=True)
    width = input_ids.shape[1]
    num_tokens = upload(torch.tensor([len(sequence) for sequence in sequences]), device)
    attention_mask = torch.arange(width, device=device)[None] < num_tokens[:, None]
    # the token before the one that is scored, which for the first is the prompt's last
    firsts = [i * width + packed.prompt_lengths[i // 2] - 1 for i in range(len(sequences))]
    offsets = packed.scored_offsets.split(packed.completion_lengths)
    spans = [first + of for first, of in zip(firsts, offsets, strict=True)]
    if packed.terms.prompt:
        starts = range(0, 2 * width * packed.num_pairs, 2 * width)
        spans += [
            torch.arange(start, start + length - 1)
            for start, length in zip(starts, packed.prompt_lengths, strict=True)
        ]
    score_positions = torch.cat(spans)
    places = pad_sequence(_unpacked(packed.position_ids[0], packed), batch_first=True)
    return PaddedPairs(input_ids, attention_mask.long(), upload(score_positions, device), places)
