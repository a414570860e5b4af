"""A packed row as sequences, one for each answer, as a model wants them that mixes tokens.

Shapes: A answers, T packed tokens, C scored tokens, L tokens of the longest sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.engine.forward.packing import PackedPairs, upload


def unpack_sequences(packed: PackedPairs) -> list[Tensor]:
    """The A plain sequences: the prompt and an answer, in the order of the answers.

    >>> from dpo_dist.engine.forward.packing import pack_pairs
    >>> [ids.tolist() for ids in unpack_sequences(pack_pairs([([5, 6, 7], [8, 9], [4])]))]
    [[5, 6, 7, 8, 9], [5, 6, 7, 4]]
    """
    return unpack(packed.input_ids[0], packed.part_lengths)


def unpack(row: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """The A sequences that a (T, ...) row is made of; of each group the lengths of its parts."""
    parts = iter(row.split([length for lengths in groups for length in lengths]))
    sequences: list[Tensor] = []
    for lengths in groups:
        prompt, *answers = itertools.islice(parts, len(lengths))
        sequences += [torch.cat((prompt, answer)) for answer in answers]
    return sequences


@dataclass(frozen=True)
class PaddedPairs:
    """The same answers as A sequences, each behind its prompt, right-padded."""

    input_ids: Tensor  # (A, L)
    attention_mask: Tensor  # (A, L), 1 on tokens, 0 on padding
    score_positions: Tensor  # (C,), into the flattened (A * L) positions; order of `packed.targets`
    position_ids: Tensor  # (A, L), 0 on padding
    score_places: Tensor  # (C,) the score positions once more; stay on the host


def pad_pairs(packed: PackedPairs) -> PaddedPairs:
    """Unpack into A right-padded sequences for a model that must not see two in one row.

    The padding comes after all that is scored, so in a causal model nothing flows back from it.

    >>> from dpo_dist.engine.forward.packing import pack_pairs
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
    lasts = [packed.prompt_lengths[group] - 1 for group in packed.group_of]
    offsets = packed.scored_offsets.split(packed.scored_lengths)
    spans = [row * width + lasts[row] + of for row, of in enumerate(offsets)]
    if packed.terms.prompt:  # in the first sequence of each group
        rows = itertools.accumulate(packed.group_sizes[:-1], initial=0)
        spans += [
            torch.arange(row * width, row * width + length - 1)
            for row, length in zip(rows, packed.prompt_lengths, strict=True)
        ]
    score_places = torch.cat(spans)
    places = pad_sequence(unpack(packed.position_ids[0], packed.part_lengths), batch_first=True)
    return PaddedPairs(
        input_ids, attention_mask.long(), upload(score_places, device), places, score_places
    )
