"""Scoring without gradients: the reference pass, evaluation, the gate and the probe.

N pairs of a wave.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.engine import collectives
from dpo_dist.engine.forward import score_pairs
from dpo_dist.engine.packing import pack_pairs

TokenIds = tuple[Sequence[int], Sequence[int], Sequence[int]]  # prompt, chosen, rejected


class MicroBatch(Protocol):
    """Pairs of one forward; one that is not counted only keeps its rank in step."""

    @property
    def pair_indices(self) -> tuple[int, ...]: ...
    @property
    def counted(self) -> bool: ...


@torch.no_grad()
def score(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], TokenIds],
    device: torch.device,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """This rank's counted pairs: indices (N,) and completion log-probs (N, 2).

    Dropout is off while scoring and the model's mode is put back after.
    """
    indices: list[int] = []
    scores = [np.zeros((0, 2), dtype=np.float32)]
    training = model.training
    model.eval()
    try:
        for batch in micro_batches:
            pairs = [token_ids(index) for index in batch.pair_indices]
            result = score_pairs(model, pack_pairs(pairs, device)).float().cpu().numpy()
            if batch.counted:
                indices += batch.pair_indices
                scores.append(result)
    finally:
        model.train(training)
    return np.array(indices, dtype=np.int64), np.concatenate(scores)


def score_on_all_ranks(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], TokenIds],
    device: torch.device,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """As `score`, for the micro-batches of every rank, with the same answer on every rank."""
    parts = collectives.gather(score(model, micro_batches, token_ids, device))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
