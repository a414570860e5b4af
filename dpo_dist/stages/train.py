"""DPO training: prepared pairs + reference log-probs -> metrics and sharded checkpoints.

1. Open the pairs, build the engine, look the reference up for its layout.
2. Resume, or start through the step-0 gate.
3. For every step plan its micro-batches; of each pack (while the one before it computes), score,
   look the reference up, loss, backward; add up over ranks; update; record.
4. Evaluate, checkpoint and answer prompts when due; at a signal stop with a checkpoint committed.
5. End at the last step, or when evaluations no longer get better.
"""

import logging
import time
from pathlib import Path

import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import with_last
from dpo_dist.engine.checkpoints import checkpoint
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import make_deterministic
from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.model.policy import PolicyParts, build_policy, settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.inputs.scored_pairs import objective_of, with_reference
from dpo_dist.inputs.setup import count_shape
from dpo_dist.inputs.work import Work, checked_work
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.stop_flag import StopFlag, Stopped
from dpo_dist.run.topology import Topology, from_environment
from dpo_dist.training.coupled import step_gradients
from dpo_dist.training.gate import check_start
from dpo_dist.training.job import Job
from dpo_dist.training.profiling import profiled
from dpo_dist.training.records import Records, open_records
from dpo_dist.training.resume import has_ended, input_digests
from dpo_dist.training.speed import peak_of
from dpo_dist.training.sums import StepSums
from dpo_dist.watch.heartbeat import beat, during

_logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Path:
    """Trains to the last step and returns its checkpoint. Raises Stopped on a signal."""
    paths, topology, models = RunDir(config.run.dir), from_environment(), RunModels(config)
    topology.in_teams_of(config.train.sequence_parallel)  # refuses ranks that would be left over
    work, stop = checked_work(models), StopFlag().install()
    if config.train.deterministic:
        make_deterministic()
    with collectives.process_group(topology) as device:
        digests = input_digests(models, work.train)
        settings = config.checkpoint
        began = time.monotonic()
        resume = checkpoint.choose_resume(paths.checkpoints_dir, settings.resume)
        verified = time.monotonic()
        if resume is not None:
            # verified first: one that is damaged is no end, and an export would refuse it
            if settings.resume == "auto" and has_ended(models, digests, work.num_steps, resume):
                return resume
            checkpoint.check_ours(resume, settings.trusted_owners)
        job = _build_job(models, work, topology, device, resume)
        digests |= {"reference": job.train.reference_digest}
        if resume is None:
            check_start(job)
        built = time.monotonic()
        state = checkpoint.load(job.engine, resume, digests) if resume else None
        last_step = state.step if state else 0
        if state and collectives.is_first():
            _logger.info(
                "goes on after step %d (verified in %.1f s, model and data %.1f s, loaded %.1f s)",
                last_step, verified - began, built - verified, time.monotonic() - built,
            )  # fmt: skip
        with open_records(job, state, digests) as records:
            if not records.begin(last_step):
                with during("step"):
                    last_step = _train(job, last_step + 1, records, stop)
        zero.take_down(job.engine)
    return paths.checkpoint_dir(last_step)


def _build_job(
    models: RunModels, work: Work, topology: Topology, device: torch.device, resume: Path | None
) -> Job:
    """The engine, ready to load `resume`, beside the pairs with their reference log-probs."""
    config, settings = models.config, models.config.train
    sharding = ds_config.training_config(
        settings, config.model.dtype, topology.world_size,
        universal=checkpoint.needs_resharding(resume, topology.world_size),
    )  # fmt: skip
    parts = PolicyParts(models.base, config.model, config.adapter, models.start_adapter)
    engine, scorer = build_policy(
        parts, settings, sharding, num_steps=work.num_steps, device=device, seed=config.run.seed
    )
    record = RunDir(config.run.dir).self_check_path
    layout = settle_layout(engine, scorer, config.model, device, record)
    objective = objective_of(config)
    experts = num_experts(scorer.policy) if objective.router_aux_loss_coef else 0
    train, held_out = with_reference(models, [work.train, work.held_out], layout)
    return Job(
        models, topology, device, engine, train, held_out, work.num_steps, objective,
        objective.terms(experts),
        shape=count_shape(config, config.adapter) if peak_of(device, config.model.dtype) else None,
    )  # fmt: skip


def _train(job: Job, first_step: int, records: Records, stop: StopFlag) -> int:
    """Trains from `first_step` on; returns the last step. Raises Stopped on a signal.

    The loss is the sum over the global batch divided by its size: the same number for any packing,
    number of ranks and token budget.
    """
    step, watch, settings = first_step - 1, zero.GradientWatch(job.engine), job.config.train
    for step in profiled(job, range(first_step, job.num_steps + 1)):
        sums = StepSums.zeros(job.objective, job.device)
        batches, step_pairs = job.micro_batches(step), job.step_pairs(step)
        watch.reset()
        coupled = job.config.objective.second_forward
        gradients = step_gradients(job, batches, sums) if coupled else iter(())
        with job.packed(batches) as rows:
            for (batch, is_last), packed in zip(with_last(batches), rows, strict=True):
                columns = score_pairs(job.engine, packed)
                if not batch.counted:  # a filler only keeps its rank in step
                    loss = 0.0 * columns.sum()
                elif coupled:
                    loss = (columns * next(gradients)).sum()
                else:
                    logps = job.train.logps(columns, batch.pair_indices, job.terms, step_pairs)
                    losses = pair_losses(logps, job.objective)
                    loss = losses.sum() / len(step_pairs)
                    sums.add_pairs(logps, losses)
                if is_last:  # a loss that is not finite makes the gradient so, which all refuse
                    loss = loss * sums.one_if_finite()
                zero.backward(job.engine, loss, last=is_last, world_size=job.topology.world_size)
                beat()
                if batch.counted:
                    sums.add_tokens(packed)
        own, alike = sums, settings.sequence_parallel
        sums = own.over_ranks(stopping=bool(stop), written=records.is_written, alike=alike)
        update = zero.update(job.engine)
        beat()
        if not update.applied:
            records.skip(step, sums, update, own.is_finite and watch.is_finite)
        stopping = sums.ranks_stopping > 0
        records.report(step, sums, update, stopping)
        if sums.ranks_written == job.topology.world_size:
            records.commit()
        if records.finish_step(step, stopping):
            break
        if stopping:
            raise Stopped(f"training stopped after step {step} of {job.num_steps}")
    return step
