"""Scoring without gradients: the reference pass, evaluation, the gate and the probe."""

from collections.abc import Iterable, Sequence

import torch

from dpo_dist.engine.forward import score_pairs
from dpo_dist.engine.packing import pack_pairs

TokenIds = tuple[Sequence[int], Sequence[int], Sequence[int]]  # prompt, chosen, rejected


@torch.no_grad()
def score(
    model: torch.nn.Module, micro_batches: Iterable[Sequence[TokenIds]], device: torch.device
) -> torch.Tensor:
    """(num_pairs, 2) float32 on the CPU: completion log-probs in the order of the micro-batches.

    Dropout is off while scoring and the model's mode is put back after.
    """
    training = model.training
    model.eval()
    try:
        scores = [score_pairs(model, pack_pairs(pairs, device)).cpu() for pairs in micro_batches]
    finally:
        model.train(training)
    return torch.cat(scores) if scores else torch.zeros(0, 2)
