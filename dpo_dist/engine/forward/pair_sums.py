"""Sums over the tokens of a pair: what a forward hands to the losses.

Shapes: B pairs, C scored positions, K columns, E experts of a layer, R rows of router logits.
A pair's two answers may each belong to other pairs as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_dist.engine.forward.packing import PackedPairs


def pair_columns(
    packed: PackedPairs,
    logps: Tensor,
    log_sum_sq: Tensor | None = None,
    routers: Tensor | None = None,
) -> Tensor:
    """(B, K) columns that `packed.terms` asks for, in the order of its `widths`.

    logps and log_sum_sq are (C,) as `packed.target_lengths` divides them, routers is (B, 2 E).
    """
    terms, num_answers = packed.terms, len(packed.answer_lengths)
    parts = logps.split(packed.target_lengths)
    columns = [_weighted(parts, packed, terms.ld_alpha)]
    if terms.unweighted:
        columns.append(_weighted(parts, packed, 1.0))
    if terms.prompt:
        prompts, group_of = [part.sum() for part in parts[num_answers:]], packed.group_of
        of_pairs = [prompts[group_of[chosen]] for chosen, _ in packed.pairs]
        columns.append(torch.stack(of_pairs)[:, None])
    if terms.sum_sq:
        assert log_sum_sq is not None, "the head made no log_sum_sq"
        columns.append(_weighted(log_sum_sq.split(packed.target_lengths), packed, 1.0))
    if terms.num_experts:
        assert routers is not None, "the model gave no router logits"
        columns.append(routers)
    return torch.cat(columns, dim=1)


def _weighted(parts: Sequence[Tensor], packed: PackedPairs, ld_alpha: float) -> Tensor:
    """(B, 2) sums; tokens past the length of the pair's shorter answer count ld_alpha.

    The answers come first in `parts`. Liu et al. 2024 (LD-DPO, arXiv:2409.06411).
    """
    if ld_alpha == 1.0:
        whole = [part.sum() for part in parts[: len(packed.answer_lengths)]]
        return torch.stack([whole[answer] for pair in packed.pairs for answer in pair]).view(-1, 2)
    sums: list[Tensor] = []
    for pair in packed.pairs:
        chosen, rejected = (parts[answer] for answer in pair)
        both = min(len(chosen), len(rejected))
        sums += [part[:both].sum() + ld_alpha * part[both:].sum() for part in (chosen, rejected)]
    return torch.stack(sums).view(-1, 2)


def router_sums(
    router_logits: Sequence[Tensor], weights: Tensor, part_of: Tensor, num_parts: int, top_k: int
) -> Tensor:
    """(parts, 2 E): how often the routers of all layers chose each expert, and its probabilities.

    router_logits are (R, E) for each layer; a row counts `weights` (R,) times for part `part_of`
    (R,). Gradients reach the logits through the probabilities only, as in Switch Transformer.
    """
    total = weights.new_zeros((num_parts, 2 * router_logits[0].shape[-1]))
    for layer in router_logits:
        probs = layer.reshape(len(weights), -1).softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0)
        both = torch.cat([chosen, probs], dim=1).float() * weights[:, None]
        total = total.index_add(0, part_of, both)
    return total
