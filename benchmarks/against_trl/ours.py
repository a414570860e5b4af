"""This project's reference pass and optimizer steps, from the parts that its stages are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.against_trl.job import BETA, LEARNING_RATE, SEED, Clock, Job, new_clock
from benchmarks.against_trl.rows import PairIds, shared_parts
from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.data.batches import (
    MicroBatch,
    Plan,
    plan_micro_batches,
    plan_scoring_batches,
    with_last,
)
from dpo_dist.data.shared_parts import SharedParts
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import PackedPairs, pack_ahead
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.engine.model.policy import PolicyParts, build_policy, load_policy, settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps
from dpo_dist.reference.arrays import IntArray
from dpo_dist.run.topology import Topology, from_environment
from dpo_dist.training.sums import StepSums


def measure(job: Job) -> dict[str, Any]:
    """The figures of this rank."""
    clock, topology = new_clock(job), from_environment()
    ids = job.token_ids(AutoTokenizer.from_pretrained(job.model))
    with collectives.process_group(topology) as device:
        section = ModelSection.model_validate({"path": job.model, "dtype": "float32"})
        reference = _reference_pass(job, ids, section, topology, device, clock)
        train = TrainSection.model_validate(
            {
                "learning_rate": LEARNING_RATE, "lr_schedule": "constant", "warmup_ratio": 0.0,
                "gradient_checkpointing": False, "micro_batch_tokens": job.budget,
                "deepspeed": "zero0" if job.sharding == "plain" else job.sharding,
            }
        )  # fmt: skip
        adapter = AdapterSection() if job.adapter else None
        sharding = ds_config.training_config(train, "float32", topology.world_size)
        engine, scorer = build_policy(
            PolicyParts(Path(job.model), section, adapter), train, sharding, num_steps=job.steps,
            device=device, seed=SEED,
        )  # fmt: skip
        settle_layout(engine, scorer, section, device)
        for step in range(job.steps):
            pairs = np.arange(step * job.pairs, (step + 1) * job.pairs)
            clock.begin(step)
            _step(job, engine, ids, pairs, reference, device, clock)
            clock.end(step)
        zero.take_down(engine)
    clock.figures["logps"] = reference[-job.pairs :].tolist()
    return clock.figures


def _reference_pass(
    job: Job, ids: Sequence[PairIds], section: ModelSection, topology: Topology,
    device: torch.device, clock: Clock,
) -> torch.Tensor:  # fmt: skip
    """(pairs, 2) log-probs, timed over the pairs of the last step."""
    began, scores = time.perf_counter(), torch.zeros(len(ids), 2)
    scorer = PairScorer(load_policy(PolicyParts(Path(job.model), section), device).eval())
    settle_layout(scorer, scorer, section, device)
    lengths, seconds = _lengths(ids), 0.0
    for pairs in np.split(np.arange(len(ids)), job.steps):
        clock.collectives.reset()
        start = time.perf_counter()
        waves = plan_scoring_batches(
            lengths, pairs, topology.world_size, job.budget, shared=_shared(job, ids)
        )
        for wave in waves:
            for indices, columns in collectives.gather(_scored(job, scorer, ids, wave, device)):
                scores[indices] = columns
        seconds = time.perf_counter() - start
    clock.reference(seconds, time.perf_counter() - began)
    return scores


@torch.no_grad()
def _scored(
    job: Job, scorer: PairScorer, ids: Sequence[PairIds], wave: Plan, device: torch.device
) -> tuple[list[int], torch.Tensor]:
    """Which pairs this rank has scored, and their (N, 2) log-probs."""
    own = wave[collectives.place()[0]]
    indices = [index for batch in own if batch.counted for index in batch.pair_indices]
    with _packed(job, ids, own, device) as rows:
        columns = [
            score_pairs(scorer, row) for batch, row in zip(own, rows, strict=True) if batch.counted
        ]
    return indices, torch.cat(columns) if columns else torch.zeros(0, 2)


def _step(
    job: Job, engine: Any, ids: Sequence[PairIds], pairs: IntArray, reference: torch.Tensor,
    device: torch.device, clock: Clock,
) -> None:  # fmt: skip
    """An optimizer step as `stages/train.py` does it."""
    rank, ranks = collectives.place()
    plan = plan_micro_batches(_lengths(ids), pairs, ranks, job.budget, _shared(job, ids))
    objective, own = Objective(beta=BETA), plan[rank]
    sums = StepSums.zeros(objective, device)
    with _packed(job, ids, own, device) as rows:
        for (batch, is_last), row in zip(with_last(own), rows, strict=True):
            columns = score_pairs(engine, row)
            loss = 0.0 * columns.sum()
            if batch.counted:
                given = reference[list(batch.pair_indices)]
                logps = PairLogps.from_columns(columns, given, row.lengths)
                losses = pair_losses(logps, objective)
                loss = losses.sum() / len(pairs)
                sums.add_pairs(logps, losses)
            sums.add_tokens(row)  # fillers as well: they are computed
            zero.backward(engine, loss, last=is_last, world_size=ranks)
    sums = sums.over_ranks(stopping=False, written=False)
    zero.update(engine)
    clock.figures["losses"].append(sums.means()["loss"])
    clock.figures["tokens"].append(sums.tokens)
    clock.figures["micro_batches"] = len(own)


def _packed(
    job: Job, ids: Sequence[PairIds], batches: list[MicroBatch], device: torch.device
) -> AbstractContextManager[Iterator[PackedPairs]]:
    return pack_ahead(batches, lambda index: ids[index], device, shared=job.system == "ours")


def _lengths(ids: Sequence[PairIds]) -> IntArray:
    """(pairs,) tokens of prompt | chosen | rejected."""
    return np.array([sum(map(len, pair)) for pair in ids])


def _shared(job: Job, ids: Sequence[PairIds]) -> SharedParts | None:
    return shared_parts(ids) if job.system == "ours" else None
