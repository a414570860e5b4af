"""Sums over the tokens of a pair: what a forward hands to the losses.

Shapes: B pairs, C scored positions, K columns, E experts of a layer, R rows of router logits.
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
    terms, num_completions = packed.terms, 2 * packed.num_pairs
    parts = logps.split(packed.target_lengths)
    completions = parts[:num_completions]
    columns = [_weighted(completions, terms.ld_alpha)]
    if terms.unweighted:
        columns.append(_weighted(completions, 1.0))
    if terms.prompt:
        columns.append(torch.stack([part.sum() for part in parts[num_completions:]])[:, None])
    if terms.sum_sq:
        assert log_sum_sq is not None, "the head made no log_sum_sq"
        columns.append(_weighted(log_sum_sq.split(packed.target_lengths)[:num_completions], 1.0))
    if terms.num_experts:
        assert routers is not None, "the model gave no router logits"
        columns.append(routers)
    return torch.cat(columns, dim=1)


def _weighted(completions: Sequence[Tensor], ld_alpha: float) -> Tensor:
    """(B, 2) sums; tokens past the length of the pair's shorter completion count ld_alpha.

    Liu et al. 2024 (LD-DPO, arXiv:2409.06411).
    """
    if ld_alpha == 1.0:
        return torch.stack([completion.sum() for completion in completions]).view(-1, 2)
    sums: list[Tensor] = []
    for chosen, rejected in zip(completions[::2], completions[1::2], strict=True):
        shared = min(len(chosen), len(rejected))
        sums += [c[:shared].sum() + ld_alpha * c[shared:].sum() for c in (chosen, rejected)]
    return torch.stack(sums).view(-1, 2)


def router_columns(
    router_logits: Sequence[Tensor], weights: Tensor, pair_of: Tensor, num_pairs: int, top_k: int
) -> Tensor:
    """(B, 2 E): how often the routers of all layers chose each expert, and its probabilities.

    router_logits are (R, E) for each layer; a row counts `weights` (R,) times for pair `pair_of`
    (R,). Gradients reach the logits through the probabilities only, as in Switch Transformer.
    """
    total = weights.new_zeros((num_pairs, 2 * router_logits[0].shape[-1]))
    for layer in router_logits:
        probs = layer.reshape(len(weights), -1).softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0)
        both = torch.cat([chosen, probs], dim=1).float() * weights[:, None]
        total = total.index_add(0, pair_of, both)
    return total
