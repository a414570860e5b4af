"""What training computes: an optimizer step, an evaluation, the step-0 gate.

B pairs in a micro-batch, K columns of a forward, M metrics.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dpo_dist.config.run_config import RunConfig, scoring_budget
from dpo_dist.data.batches import (
    MicroBatch,
    plan_micro_batches,
    plan_scoring_batches,
    step_pair_indices,
)
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.forward.scoring import look_ahead, score_on_all_ranks
from dpo_dist.engine.sharding import zero
from dpo_dist.errors import DPODistError, GateError
from dpo_dist.inputs.scored_pairs import IntArray, ScoredPairs
from dpo_dist.metrics.evaluations import Evaluation
from dpo_dist.objective.mixture import pair_losses, step_gradient
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import Terms
from dpo_dist.objective.rewards import metric_means, metric_names, metric_sums
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.stop_flag import StopFlag
from dpo_dist.run.topology import Topology

_logger = logging.getLogger(__name__)
# What the packing of a micro-batch may change in a log-prob, per square root of its tokens (the
# rounding errors of tokens add up like a random walk). DESIGN.md says how it was measured.
GATE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
EXTRA_SUMS = 3  # behind the M metrics: packed tokens, tokens without sharing, ranks told to stop


@dataclass(frozen=True)
class Job:
    """What every step of this rank needs."""

    config: RunConfig
    paths: RunDir
    topology: Topology
    device: torch.device
    engine: Any
    train: ScoredPairs
    held_out: ScoredPairs
    num_steps: int
    objective: Objective
    terms: Terms  # what its losses need of a forward
    evaluations: list[Evaluation] = field(default_factory=list)  # so far, also before a resume

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The M metrics."""
        return metric_names(self.objective)

    def no_sums(self) -> torch.Tensor:
        """(M + 3,) zeros."""
        return torch.zeros(len(self.metric_names) + EXTRA_SUMS, dtype=torch.float64)

    def pair_indices(self, step: int) -> IntArray:
        """The pairs of optimizer step 1, 2, ... over all ranks."""
        global_batch_size = self.config.train.global_batch_size
        return step_pair_indices(
            step - 1, len(self.train.pairs), global_batch_size, self.config.run.seed
        )

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step 1, 2, ..."""
        settings, pairs = self.config.train, self.train.pairs
        plan = plan_micro_batches(
            pairs.packed_lengths,
            self.pair_indices(step),
            self.topology.world_size,
            settings.micro_batch_tokens,
        )
        return plan[self.topology.rank]


def optimizer_step(job: Job, step: int, stop: StopFlag) -> tuple[torch.Tensor, float, float]:
    """One optimizer step: ((M + 3,) sums over all ranks, gradient norm, learning rate).

    The loss is the sum over the global batch divided by its size: the same number for any
    packing, number of ranks and token budget. Raises DPODistError on every rank when it is not
    finite, before the update.
    """
    sums, num_metrics = job.no_sums().to(job.device), len(job.metric_names)
    micro_batches, step_indices = job.micro_batches(step), job.pair_indices(step)
    gradients: Iterator[torch.Tensor] | None = None
    if job.config.objective.second_forward:
        gradients, sums[:num_metrics] = _step_gradients(job, micro_batches)
    for position, batch in enumerate(micro_batches, start=1):
        token_ids = [job.train.pairs.token_ids(index) for index in batch.pair_indices]
        packed = pack_pairs(token_ids, job.device, job.terms)
        columns = score_pairs(job.engine, packed)
        if not batch.counted:  # a filler only keeps its rank in step
            loss = 0.0 * columns.sum()
        elif gradients is not None:
            loss = (columns * next(gradients)).sum()
        else:
            logps = job.train.logps(columns, batch.pair_indices, job.terms, step_indices)
            losses = pair_losses(logps, job.objective)
            loss = losses.sum() / len(step_indices)
            sums[:num_metrics] += metric_sums(logps, losses, job.objective)
        last = position == len(micro_batches)
        zero.backward(job.engine, loss, last=last, world_size=job.topology.world_size)
        if batch.counted:
            sums[-3] += packed.num_tokens
            sums[-2] += packed.num_tokens_unshared
    sums[-1] = bool(stop)
    sums = collectives.sum_over_ranks(sums).cpu()
    if not sums.isfinite().all():
        pairs = sorted(i for b in job.micro_batches(step) for i in b.pair_indices)
        raise DPODistError(
            f"step {step}: the loss or a reward is not finite (this rank's pairs: {pairs})",
            "finite numbers",
            "Look at these pairs; lower train.learning_rate or set model.dtype=float32.",
        )
    return sums, *zero.update(job.engine)


def _step_gradients(
    job: Job, micro_batches: list[MicroBatch]
) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """For a loss that needs all pairs of a step at once, from a forward ahead of the training one.

    (The gradient of the step's loss by the columns (B, K) of each of this rank's counted
    micro-batches, (M,) sums of the step's metrics on rank 0 and zeros on the others.)
    """
    indices, columns, own = look_ahead(
        job.engine, micro_batches, job.train.pairs.token_ids, job.device, job.terms,
        job.topology.rank,
    )  # fmt: skip
    logps, losses, gradient = step_gradient(
        torch.from_numpy(columns).to(job.device),
        lambda leaf: job.train.logps(leaf, indices, job.terms),
        job.objective,
    )
    sizes = [len(batch.pair_indices) for batch in micro_batches if batch.counted]
    sums = metric_sums(logps, losses, job.objective)
    return iter(gradient[own].split(sizes)), sums * (job.topology.rank == 0)


def window_metrics(job: Job, step: int, sums: torch.Tensor, seconds: float) -> dict[str, float]:
    """Means over the pairs since the last report, and the speed of all ranks together."""
    tokens, unshared = float(sums[-3]), float(sums[-2])
    consumed = step * job.config.train.global_batch_size
    return metric_means(sums[:-EXTRA_SUMS], job.metric_names) | {
        "epoch": consumed / len(job.train.pairs),
        "consumed_pairs": float(consumed),
        "pairs_per_second": float(sums[0]) / seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_saved_by_sharing": 1 - tokens / unshared,
    }


def evaluate(job: Job) -> dict[str, float]:
    """Metrics over all held-out pairs, and of each source where there are several."""
    pairs = job.held_out.pairs
    scores, order = [], []
    for wave in plan_scoring_batches(
        pairs.packed_lengths, range(len(pairs)), job.topology.world_size, scoring_budget(job.config)
    ):
        own = wave[job.topology.rank]
        indices, columns = score_on_all_ranks(
            job.engine, own, pairs.token_ids, job.device, job.terms
        )
        order.append(indices)
        scores.append(columns)
    columns, rows = torch.from_numpy(np.concatenate(scores)), np.concatenate(order)
    means: dict[str, float] = {}
    for suffix, of_source in job.held_out.by_source(rows):
        logps = job.held_out.logps(columns[of_source], rows[of_source], job.terms)
        sums = metric_sums(logps, pair_losses(logps, job.objective), job.objective)
        found = metric_means(sums, job.metric_names)
        means |= {f"{name}{suffix}": mean for name, mean in found.items()}
    return means


def check_start(job: Job) -> None:
    """The step-0 gate: the untrained engine must give the log-probs that the store holds.

    Catches a stale store, another template, a mask that is off by one, dropout left on. Without a
    reference the model's own logits take its place, for one pair of every rank. Raises GateError
    on every rank.
    """
    own, ids = job.micro_batches(1)[:1], job.train.pairs.token_ids
    if job.objective.reference_free:  # as many plain forwards on every rank: ZeRO-3 is in lock-step
        own = [replace(batch, pair_indices=batch.pair_indices[:1]) for batch in own]
    indices, columns = score_on_all_ranks(job.engine, own, ids, job.device, job.terms)
    logps = job.train.logps(torch.from_numpy(columns), indices, job.terms)
    reference, there = job.train.reference[indices].numpy(), "the reference"
    remedy = (
        "Check that reference.model is what training starts from; if so, delete the "
        "reference store and run `dpo-dist reference` again."
    )
    if job.objective.reference_free:
        _, reference = score_on_all_ranks(job.engine, own, ids, job.device, layout="plain")
        there, remedy = "the model's own logits", "Set model.layout to padded."
    scores = columns[:, :2]
    differences = np.abs(scores - reference) / np.sqrt(logps.lengths.numpy())
    worst = int(differences.max(axis=1).argmax())
    largest, tolerance = differences[worst].max(), GATE_TOLERANCE[job.config.model.dtype]
    if not bool(largest <= tolerance):
        raise GateError(
            f"step-0 gate: pair {indices[worst]} scores {scores[worst].tolist()} in the untrained "
            f"policy and {reference[worst].tolist()} in {there} (chosen, rejected), "
            f"{largest:.2e} apart per square root of tokens",
            f"the same within {tolerance:.0e}",
            remedy,
        )
    if job.topology.rank == 0:
        _logger.info(
            "step-0 gate passed on %d pairs: largest difference from %s %.1e per square root of "
            "tokens (tolerance %.0e), loss %.6f",
            len(indices), there, largest, tolerance, pair_losses(logps, job.objective).mean(),
        )  # fmt: skip
