"""DPO training: prepared pairs + reference log-probs -> metrics and sharded checkpoints.

1. Open the pairs, build the engine, look the reference up for its layout.
2. Resume, or start through the step-0 gate.
3. For every step: its micro-batches, score, loss, backward; one summed vector; update.
4. Evaluate, checkpoint and answer prompts when due; at a signal stop with a checkpoint committed.
5. End at the last step, or when evaluations no longer get better.

B pairs in a micro-batch, M metrics.
"""

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import plan_micro_batches
from dpo_dist.data.pairs import Pairs
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.checkpoints import checkpoint
from dpo_dist.engine.checkpoints.retention import best_standing, marked
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.memory import peak_memory_gib
from dpo_dist.engine.forward.generation import answer_in_training
from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.scoring import score
from dpo_dist.engine.model.policy import build_policy, settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.errors import CheckpointError
from dpo_dist.inputs.scored_pairs import distinct_prompts, objective_of, with_reference
from dpo_dist.inputs.sizes import checked_work
from dpo_dist.metrics import wandb_log
from dpo_dist.metrics.evaluations import Evaluation, early_stop, ranked_steps, record
from dpo_dist.metrics.writer import Kind, MetricsWriter
from dpo_dist.model_files.of_run import base_model_dir, start_adapter_dir, start_digest
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import digest_of
from dpo_dist.run.run_dir import RunDir, step_of
from dpo_dist.run.status import update_status
from dpo_dist.run.stop_flag import StopFlag, Stopped
from dpo_dist.run.topology import from_environment
from dpo_dist.training.step import Job, check_start, evaluate, optimizer_step, window_metrics

_logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Path:
    """Trains to the last step and returns its checkpoint. Raises Stopped on a signal."""
    paths, topology = RunDir(config.run.dir), from_environment()
    work, settings = checked_work(config), config.train
    pairs, held_out, total = work.train, work.held_out, work.num_steps
    stop = StopFlag().install()
    with collectives.process_group(topology) as device:
        digests = _input_digests(config, pairs)
        if ended := _ended_at(config, digests, total):
            return ended
        resume = checkpoint.choose_resume(paths.checkpoints_dir, config.checkpoint.resume)
        convert = checkpoint.needs_conversion(resume, topology.world_size)
        sharding = ds_config.training_config(
            settings, config.model.dtype, topology.world_size, universal=convert
        )
        engine, scorer = build_policy(
            base_model_dir(config), config.model, config.adapter, settings,
            sharding=sharding, num_steps=total, device=device, seed=config.run.seed,
            start=start_adapter_dir(config),
        )  # fmt: skip
        layout = settle_layout(engine, scorer, config.model, device)
        objective = objective_of(config)
        experts = num_experts(scorer.policy) if objective.router_aux_loss_coef else 0
        terms = objective.terms(experts)
        train, evaluated = (with_reference(config, split, layout) for split in (pairs, held_out))
        job = Job(
            config, paths, topology, device, engine, train, evaluated, total, objective, terms
        )
        identity = digests | {"reference": _reference_digest(job)}
        if resume is None:
            check_start(job)
            first_step = 1
        else:
            state = checkpoint.load(engine, resume, identity)
            job.evaluations.extend(state.evaluations)
            first_step = state.step + 1
        last_step = _train(job, first_step, identity, stop)
        zero.take_down(engine)
    return paths.checkpoint_dir(last_step)


def _input_digests(config: RunConfig, pairs: Pairs) -> dict[str, str]:
    """What a resume must find unchanged but for the reference: settings one by one, and digests.

    Rank 0 alone reads the weights, which are many when no digest of them is cached.
    """
    digests: dict[str, str] = {}
    with collectives.same_error_everywhere():
        if collectives.is_first():
            digests = training_identity(config)
            digests |= {"pairs": pairs.digest, "model": start_digest(config)}
    return collectives.broadcast(digests)


def _reference_digest(job: Job) -> str:
    return digest_of(job.train.reference.numpy().tobytes().hex())


def _ended_at(config: RunConfig, digests: dict[str, str], total: int) -> Path | None:
    """The checkpoint that training ended with, if it has ended; found out without a model.

    Rank 0 looks. Raises CheckpointError when it was trained with other settings or inputs.
    """
    ended = None
    with collectives.same_error_everywhere():
        if collectives.is_first() and config.checkpoint.resume == "auto":
            ended = _last_checkpoint(config, digests, total)
    return collectives.broadcast(ended)


def _last_checkpoint(config: RunConfig, digests: dict[str, str], total: int) -> Path | None:
    last_dir = next(iter(marked(RunDir(config.run.dir).checkpoints_dir)), None)
    if last_dir is None:
        return None
    try:
        state = checkpoint.read_train_state(last_dir)
    except CheckpointError:
        return None  # damaged: choosing what to resume from deals with it
    if state.step != total and not _early_stop(config, state.evaluations):
        return None
    reference = {"reference": state.digests["reference"]}  # needs the model's layout to look up
    checkpoint.check_resume(last_dir, state, digests | reference)
    _logger.info("train: finished, %s", last_dir)
    return last_dir


def _early_stop(config: RunConfig, evaluations: Sequence[Evaluation]) -> str | None:
    """Why training ends before the last step, None while it goes on."""
    best_by, patience = config.checkpoint.best_by, config.eval.patience
    if best_by is None or patience is None:
        return None
    return early_stop(evaluations, best_by, patience, config.eval.min_delta)


def _train(job: Job, first_step: int, identity: dict[str, str], stop: StopFlag) -> int:
    """Trains from `first_step` on; returns the last step. Raises Stopped on a signal."""
    config, lead, step = job.config, job.topology.rank == 0, first_step - 1
    if _early_stop(config, job.evaluations):
        return step
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_metrics_writer(job, first_step)) if lead else None
        bar = stack.enter_context(progress_bar("pairs", enabled=lead))
        pairs = config.train.global_batch_size
        done = (first_step - 1) * pairs
        task = bar.add_task("train", total=job.num_steps * pairs, completed=done)
        if first_step == 1 and config.eval.samples_every_steps:
            _sample(job, writer, step=0)
        if _evaluation_is_pending(job, step):
            _evaluate(job, writer, step)
            if _early_stop(config, job.evaluations):
                _save(job, step, identity)
                return step
        window, since = job.no_sums(), time.monotonic()
        for step in range(first_step, job.num_steps + 1):
            sums, grad_norm, learning_rate = optimizer_step(job, step, stop)
            window += sums
            last, stopping = step == job.num_steps, bool(sums[-1])
            if step % config.logging.every_steps == 0 or last or stopping:
                metrics = window_metrics(job, step, window, time.monotonic() - since)
                metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
                metrics["peak_memory_gib"] = peak_memory_gib(job.device)
                _report(job, writer, step, metrics)
                window.zero_()
                since = time.monotonic()
            paused = time.monotonic()  # what follows until `since` moves is no training
            # A scheduler waits a few minutes: a run that is stopped saves, and evaluates when it
            # goes on.
            if _evaluation_is_pending(job, step) and (last or not stopping):
                _evaluate(job, writer, step)
            ended = last or _early_stop(config, job.evaluations) is not None
            if step % config.checkpoint.every_steps == 0 or ended or stopping:
                _save(job, step, identity)
            bar.advance(task, pairs)
            every = config.eval.samples_every_steps
            if every and (step % every == 0 or ended) and not stopping:
                _sample(job, writer, step)
            since += time.monotonic() - paused
            if ended:
                break
            if stopping:
                raise Stopped(f"training stopped after step {step} of {job.num_steps}")
    return step


def _evaluation_is_pending(job: Job, step: int) -> bool:
    """Whether step 1, 2, ... is followed by an evaluation that has not been made."""
    due = step == job.num_steps or step % job.config.eval.every_steps == 0
    made = bool(job.evaluations) and job.evaluations[-1]["step"] == step
    return step > 0 and due and not made and len(job.held_out.pairs) > 0


def _evaluate(job: Job, writer: MetricsWriter | None, step: int) -> None:
    metrics = collectives.broadcast(evaluate(job))  # what follows is decided by them
    job.evaluations.append(record(step, metrics))
    _report(job, writer, step, metrics, "eval")


def _save(job: Job, step: int, identity: dict[str, str]) -> None:
    """Commits a checkpoint with the probe: log-probs of a few fixed pairs by this policy."""
    config, pairs = job.config, job.train.pairs
    probe = range(min(config.checkpoint.probe_pairs, len(pairs)))
    (batches,) = plan_micro_batches(
        pairs.packed_lengths,
        probe,
        world_size=1,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )
    indices, scores = score(job.engine, batches, pairs.token_ids, job.device)
    order = np.argsort(indices)
    state = checkpoint.TrainState(
        step=step,
        consumed_pairs=step * config.train.global_batch_size,
        epoch=step * config.train.global_batch_size / len(pairs),
        digests=identity,
        world_size=job.topology.world_size,
        zero_stage=job.engine.zero_optimization_stage(),
        evaluations=job.evaluations,
    )
    path = checkpoint.save(
        job.engine, job.paths.checkpoints_dir, state, indices[order], scores[order],
        keep=config.checkpoint.keep, best_by=config.checkpoint.best_by,
)  # fmt: skip
    if job.topology.rank == 0:
        _logger.info("checkpoint: %s", path)
        update_status(job.paths.status_path, last_checkpoint=str(path), progress=str(path))
        _tell_best(job)


def _tell_best(job: Job) -> None:
    """Notes in status.json the best checkpoint that stands, and why training ended early."""
    best_by, ended = job.config.checkpoint.best_by, _early_stop(job.config, job.evaluations)
    fields: dict[str, Any] = {"early_stop": ended, "best_checkpoint": None}
    if ended:
        _logger.info("%s", ended)
    best = best_standing(job.paths.checkpoints_dir, ranked_steps(job.evaluations, best_by))
    if best is not None:
        value = {line["step"]: line.get(str(best_by)) for line in job.evaluations}[step_of(best)]
        fields |= {"best_checkpoint": str(best), "best_by": best_by, "best_metric": value}
        _logger.info("best checkpoint: %s, %s %.4f", best, best_by, value)
    update_status(job.paths.status_path, **fields)


def _sample(job: Job, writer: MetricsWriter | None, step: int) -> None:
    """Lets the policy answer the first held-out prompts; rank 0 writes them down."""
    config, pairs = job.config, job.held_out.pairs
    prompts = distinct_prompts(pairs, config.eval.num_samples)
    template = resolve_template(config.data.chat_template)
    tokenizer = load_tokenizer(base_model_dir(config), template, config.model.trust_remote_code)
    answers = answer_in_training(
        job.engine, tokenizer, prompts, device=job.device, seed=config.run.seed,
        max_new_tokens=config.generate.max_new_tokens, temperature=config.generate.temperature,
        top_p=config.generate.top_p,
    )  # fmt: skip
    if writer is not None:
        texts = [str(tokenizer.decode(prompt)) for prompt in prompts]
        writer.write_samples(step, list(zip(texts, answers, strict=True)))
        _logger.info("step %d: %d samples in %s", step, len(answers), job.paths.samples_path)


def _metrics_writer(job: Job, first_step: int) -> MetricsWriter:
    tensorboard_dir = job.paths.tensorboard_dir if job.config.logging.tensorboard else None
    wandb_run = wandb_log.start_run(job.config) if job.config.logging.wandb else None
    return MetricsWriter(
        job.paths.metrics_path,
        tensorboard_dir,
        resume_step=first_step - 1 if first_step > 1 else -1,
        samples_path=job.paths.samples_path,
        wandb_run=wandb_run,
    )


def _report(
    job: Job,
    writer: MetricsWriter | None,
    step: int,
    metrics: dict[str, float],
    kind: Kind = "train",
) -> None:
    """On rank 0 writes metrics to the files, to status.json, and as one line to the log."""
    if writer is None:
        return
    writer.write(step, metrics, kind)
    _logger.info(
        "step %d/%d %s: loss %.4f, margin %.3f, accuracy %.3f%s",
        step, job.num_steps, kind, metrics["loss"], metrics["rewards/margins"],
        metrics["rewards/accuracies"],
        f", {metrics['pairs_per_second']:.1f} pairs/s" if kind == "train" else "",
    )  # fmt: skip
    if kind == "train":
        seconds = job.config.train.global_batch_size / metrics["pairs_per_second"]
        progress = {"step": step, "num_steps": job.num_steps, "seconds_per_step": seconds}
        update_status(job.paths.status_path, train=progress | metrics)
