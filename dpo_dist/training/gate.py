"""The step-0 gate: training starts only from the model that the reference was scored with."""

import logging
from dataclasses import replace

import numpy as np
import torch

from dpo_dist.engine.forward.scoring import score_on_all_ranks
from dpo_dist.errors import GateError
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.training.job import Job

_logger = logging.getLogger(__name__)
# What the packing of a micro-batch may change in a log-prob, per square root of its tokens (the
# rounding errors of tokens add up like a random walk). DESIGN.md says how it was measured.
GATE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def check_start(job: Job) -> None:
    """The untrained engine must give the log-probs that the store holds, in the whole first step.

    Catches a stale store, another template, a mask that is off by one, dropout left on, a pair
    that depends on its micro-batch. Without a reference the model's own logits take its place, for
    the first pair of every micro-batch. Raises GateError on every rank.
    """
    own, ids = job.micro_batches(1), job.train.pairs.token_ids
    indices, columns = score_on_all_ranks(job.engine, own, ids, job.device, job.terms)
    if not job.objective.reference_free:
        reference, there = job.train.reference[indices].numpy(), "the reference"
        remedy = (
            "Check that reference.model is what training starts from; if so, delete the "
            "reference store and run `dpo-dist reference` again."
        )
    else:
        firsts = [replace(batch, pair_indices=batch.pair_indices[:1]) for batch in own]
        first, reference = score_on_all_ranks(job.engine, firsts, ids, job.device, layout="plain")
        there, remedy = "the model's own logits", "Set model.layout to padded."
        position = {int(index): place for place, index in enumerate(indices)}
        columns, indices = columns[[position[int(index)] for index in first]], first
    logps = job.train.logps(torch.from_numpy(columns), indices, job.terms)
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
    if job.is_first:
        _logger.info(
            "step-0 gate passed on %d pairs: largest difference from %s %.1e per square root of "
            "tokens (tolerance %.0e), loss %.6f",
            len(indices), there, largest, tolerance, pair_losses(logps, job.objective).mean(),
        )  # fmt: skip
