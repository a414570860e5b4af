"""Losses that couple the pairs of a step, from a forward ahead of the training one.

B pairs in a micro-batch, K columns of a forward.
"""

from collections.abc import Iterator

import torch

from dpo_dist.data.batches import MicroBatch
from dpo_dist.engine.forward.scoring import look_ahead
from dpo_dist.objective.mixture import step_gradient
from dpo_dist.training.job import Job
from dpo_dist.training.sums import StepSums


def step_gradients(
    job: Job, micro_batches: list[MicroBatch], sums: StepSums
) -> Iterator[torch.Tensor]:
    """The gradient of the step's loss by the columns (B, K) of each counted micro-batch of this
    rank; the first place adds the metrics of the whole step to its `sums`."""
    indices, columns, own = look_ahead(
        job.engine, micro_batches, job.train.pairs.token_ids, job.device, job.terms,
        job.place.rank,
    )  # fmt: skip
    logps, losses, gradient = step_gradient(
        torch.from_numpy(columns).to(job.device),
        lambda leaf: job.train.logps(leaf, indices, job.terms),
        job.objective,
    )
    if job.place.rank == 0:
        sums.add_pairs(logps, losses)
    sizes = [len(batch.pair_indices) for batch in micro_batches if batch.counted]
    return iter(gradient[own].split(sizes))
