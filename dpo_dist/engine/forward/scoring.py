"""Scoring without gradients: the reference pass, evaluation, the gate and the probe.

N pairs of a wave, K columns of what is scored (2 unless other terms are asked for).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dpo_dist.data.batches import MicroBatch
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import restore_rng, rng_states
from dpo_dist.engine.forward.packing import PairIds, pack_ahead
from dpo_dist.engine.forward.pair_scorer import Layout, score_pairs, scorer_of
from dpo_dist.objective.pair_logps import COMPLETIONS, Terms
from dpo_dist.reference.arrays import IntArray, LogpArray
from dpo_dist.watch.heartbeat import beat


@torch.no_grad()
def score(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], PairIds],
    device: torch.device,
    terms: Terms = COMPLETIONS,
    *,
    dropout: bool = False,
    layout: Layout | None = None,
) -> tuple[IntArray, LogpArray]:
    """This rank's counted pairs: indices (N,) and columns (N, K), completion log-probs first.

    Without `dropout` it is off while scoring and the model's mode is put back after. The layout is
    the settled one unless another is given.
    """
    indices: list[int] = []
    scores = [torch.zeros(0, terms.num_columns, device=device)]
    training = model.training
    model.train(training and dropout)
    try:
        shared = scorer_of(model).shares_prompts
        with pack_ahead(micro_batches, token_ids, device, terms, shared=shared) as rows:
            for batch, packed in zip(micro_batches, rows, strict=True):
                columns = score_pairs(model, packed, layout)
                if batch.counted:
                    indices += batch.pair_indices
                    scores.append(columns.float())
                beat()
    finally:
        model.train(training)
    # at the end, so that the host waits for the device once and not for every micro-batch
    return np.array(indices, dtype=np.int64), torch.cat(scores).cpu().numpy()


def score_on_all_ranks(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], PairIds],
    device: torch.device,
    terms: Terms = COMPLETIONS,
    *,
    layout: Layout | None = None,
) -> tuple[IntArray, LogpArray]:
    """As `score`, for the micro-batches of every rank, with the same answer on every rank."""
    own = score(model, micro_batches, token_ids, device, terms, layout=layout)
    parts = _of_teams(model, own)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def look_ahead(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    token_ids: Callable[[int], PairIds],
    device: torch.device,
    terms: Terms,
    place: int,
) -> tuple[IntArray, LogpArray, slice]:
    """Indices (N,) and columns (N, K) of all ranks' counted pairs, and which rows are this rank's.

    `place` is this rank's among those that have other micro-batches. Its rows are in the order of
    its micro-batches. Dropout is as in training, and the generators are put back, so that a
    forward of the same micro-batches makes the same numbers.
    """
    states = rng_states()
    own = score(model, micro_batches, token_ids, device, terms, dropout=True)
    restore_rng(states)
    parts = _of_teams(model, own)
    start = sum(len(part[0]) for part in parts[:place])
    indices, columns = (np.concatenate(each) for each in zip(*parts, strict=True))
    return indices, columns, slice(start, start + len(own[0]))


def _of_teams(
    model: torch.nn.Module, own: tuple[IntArray, LogpArray]
) -> list[tuple[IntArray, LogpArray]]:
    """What the ranks scored, once for those that share their rows."""
    return collectives.gather(own)[:: scorer_of(model).ranks_per_row]
