"""What a training run leaves behind: metrics, evaluations, checkpoints, samples.

Every rank takes part in making them; rank 0 writes them down and tells.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.progress import Progress, TaskID

from dpo_dist.config.run_config import RunConfig
from dpo_dist.config.section import steps_of
from dpo_dist.engine.checkpoints.retention import best_standing
from dpo_dist.engine.checkpoints.saving import Saving
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding.zero import Update
from dpo_dist.errors import DPODistError
from dpo_dist.metrics.evaluations import Evaluation, early_stop, ranked_steps, record
from dpo_dist.metrics.wandb_log import start_run
from dpo_dist.metrics.writer import Kind, MetricsWriter
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import step_of
from dpo_dist.run.status import update_status
from dpo_dist.training.checkpointing import begin_checkpoint, host_copies
from dpo_dist.training.due import checkpoint_due, evaluation_due, report_due, samples_due
from dpo_dist.training.evaluation import answer_prompts, evaluate
from dpo_dist.training.job import Job
from dpo_dist.training.speed import speed_metrics
from dpo_dist.training.sums import StepSums
from dpo_dist.watch.heartbeat import during

_logger = logging.getLogger(__name__)
# A step that is left out now and then is an accident; more of them are a run that is broken.
SKIPPED_SHARE, MIN_SKIPPED = 0.01, 3


class Records:
    """The records of one attempt; `state` is where the run stood before it, None at its start."""

    def __init__(
        self, job: Job, state: TrainState | None, digests: Mapping[str, str],
        writer: MetricsWriter | None, bar: Progress, task: TaskID,
    ) -> None:  # fmt: skip
        self.job, self.digests = job, digests
        self.evaluations = list[Evaluation](state.evaluations if state else ())
        self.skipped_steps = list[int](state.skipped_steps if state else ())
        self._writer, self._bar, self._task = writer, bar, task
        self._saving: Saving | None = None
        self._copies = host_copies(job)
        self._window = StepSums.zeros(job.objective)
        self._since = time.monotonic()  # what the window's steps took, moved on by every pause
        self._paused = self._since

    def begin(self, last_step: int) -> bool:
        """What is missing after `last_step`, the last one that was trained; whether it ends here.

        A run that was stopped saved at once, so an evaluation that was due is made now.
        """
        if self.ended_early:
            return True
        if last_step == 0 and self.job.config.eval.samples_every_steps:
            self.sample(last_step)
        if self._evaluation_is_missing(last_step):
            self.evaluate(last_step)
            if self.ended_early:
                self.save(last_step, wait=True)
        self._since = time.monotonic()
        return self.ended_early is not None

    def skip(self, step: int, sums: StepSums, update: Update, own_is_finite: bool) -> None:
        """Writes down the pairs of a step that made no update, and leaves it out if it may be.

        `own_is_finite` is about this rank. Raises DPODistError on every rank under
        train.non_finite stop, and when too many steps were skipped.
        """
        self.commit()
        job, path = self.job, self.job.paths.non_finite_path(step)
        counted = [batch for batch in job.micro_batches(step) if batch.counted]
        own = [index for batch in counted for index in batch.pair_indices]
        told = collectives.gather((own_is_finite, own))
        ranks = [rank for rank, (finite, _) in enumerate(told) if not finite]
        pairs = [
            {"rank": rank, "index": index, **job.train.pairs.identity(index)}
            for rank, (_, indices) in enumerate(told)
            for index in indices
        ]
        content = {
            "step": step,
            "loss_is_finite": sums.is_finite,
            "grad_norm": str(update.grad_norm),
            "ranks": ranks,  # whose own numbers were not finite, as far as it shows
            "pairs": pairs,
        }
        collectives.on_first(lambda: write_json(path, content))
        self.skipped_steps.append(step)
        what = "a gradient" if sums.is_finite else "the loss or a reward"
        where = f"on rank {', '.join(map(str, ranks))}" if ranks else "on a rank that is not known"
        found = f"step {step}: {what} is not finite ({where}; the step's pairs are in {path})"
        self._check_skipped(found)
        if job.is_first:
            _logger.warning("%s: skipped", found)
            update_status(job.paths.status_path, skipped_steps=self.skipped_steps)

    def _check_skipped(self, found: str) -> None:
        """Raises DPODistError unless the last of the skipped steps may be skipped."""
        remedy = (
            "Look at these pairs, and leave bad ones out by data.leave_out; lower "
            "train.learning_rate, or set model.dtype=float32"
        )
        if self.job.config.train.non_finite == "stop":
            raise DPODistError(found, "finite numbers", f"{remedy} or train.non_finite=skip.")
        most = max(MIN_SKIPPED, int(SKIPPED_SHARE * self.job.num_steps))
        if len(self.skipped_steps) > most:
            raise DPODistError(
                f"{found}, as were those of {len(self.skipped_steps) - 1} steps before it",
                f"at most {most} of {self.job.num_steps} steps to skip: more are no accident",
                f"{remedy}.",
            )

    def report(self, step: int, sums: StepSums, update: Update, stopping: bool) -> None:
        """Adds a step to the window and, when due, writes the window's means.

        Sums that are not finite, which a skipped step may have, are left out of them.
        """
        config, ending = self.job.config, step == self.job.num_steps
        if sums.is_finite:
            self._window += sums
        now = time.monotonic()
        every = self._steps_of(config.logging.every_steps)
        due = report_due(step, every, ending=ending, stopping=stopping)
        if due and self._window.num_pairs:
            metrics = self._window.means() | speed_metrics(
                self.job, step, self._window, now - self._since
            )
            metrics |= {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
            if config.train.non_finite == "skip":
                metrics["skipped_steps"] = len(self.skipped_steps)
            self._write(step, metrics, "train")
            self._window, self._since = StepSums.zeros(self.job.objective), now
        self._paused = now

    def finish_step(self, step: int, stopping: bool) -> bool:
        """Evaluates, saves and samples what is due after a step; whether training ends with it.

        A scheduler waits a few minutes: a run that is stopped saves, and evaluates when it goes on.
        """
        config, last = self.job.config, step == self.job.num_steps
        if self._evaluation_is_missing(step) and (last or not stopping):
            self.evaluate(step)
        ending = last or self.ended_early is not None
        due = {"ending": ending, "stopping": stopping}
        if checkpoint_due(step, self._steps_of(config.checkpoint.every_steps), **due):
            self.save(step, wait=ending or stopping)
        every = config.eval.samples_every_steps
        if samples_due(step, None if every is None else self._steps_of(every), **due):
            self.sample(step)
        self._bar.advance(self._task, config.train.global_batch_size)
        self._since += time.monotonic() - self._paused
        return ending

    @property
    def ended_early(self) -> str | None:
        """Why training ends before the last step, None while it goes on."""
        return why_ended_early(self.job.config, self.evaluations)

    def evaluate(self, step: int) -> None:
        """Makes an evaluation; what follows is decided by rank 0's numbers on every rank."""
        metrics = collectives.broadcast(evaluate(self.job))
        self.evaluations.append(record(step, metrics))
        self._write(step, metrics, "eval")

    def save(self, step: int, *, wait: bool) -> None:
        """Begins a checkpoint; it is committed at the end of a step that finds it written.

        With `wait` here, as is one before it that is not committed yet.
        """
        self.commit()
        self._saving = begin_checkpoint(
            self.job, step, self.digests, self.evaluations, self.skipped_steps, self._copies
        )
        if wait or self._copies is None:
            self.commit()

    @property
    def is_written(self) -> bool:
        """Whether a checkpoint is under way of which this rank has written its files."""
        return self._saving is not None and self._saving.is_written

    @during("checkpoint")
    def commit(self) -> None:
        """Commits the checkpoint that is under way, if one is; all ranks call together."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        settings = self.job.config.checkpoint
        path = saving.commit(keep=settings.keep, best_by=settings.best_by)
        if self.job.is_first:
            _logger.info("checkpoint: %s", path)
            status_path = self.job.paths.status_path
            update_status(status_path, last_checkpoint=str(path), progress=str(path))
            self._tell_best()

    def sample(self, step: int) -> None:
        """Lets the policy answer the first held-out prompts."""
        answers = answer_prompts(self.job)
        if self._writer is not None:
            self._writer.write_samples(step, answers)
            path = self.job.paths.samples_path
            _logger.info("step %d: %d samples in %s", step, len(answers), path)

    def _evaluation_is_missing(self, step: int) -> bool:
        job = self.job
        made = bool(self.evaluations) and self.evaluations[-1]["step"] == step
        settings = job.config.eval
        every = self._steps_of(settings.every_steps)
        due = evaluation_due(step, every, job.num_steps, on_start=settings.on_start)
        return due and not made and len(job.held_out.pairs) > 0

    def _steps_of(self, interval: int | float) -> int:
        return steps_of(interval, self.job.num_steps)

    def _tell_best(self) -> None:
        """Notes in status.json the best checkpoint that stands, and why training ended early."""
        best_by, paths = self.job.config.checkpoint.best_by, self.job.paths
        ended = self.ended_early
        fields: dict[str, object] = {"early_stop": ended, "best_checkpoint": None}
        if ended:
            _logger.info("%s", ended)
        best = best_standing(paths.checkpoints_dir, ranked_steps(self.evaluations, best_by))
        if best is not None:
            value = {line["step"]: line.get(str(best_by)) for line in self.evaluations}
            metric = value[step_of(best)]
            fields |= {"best_checkpoint": str(best), "best_by": best_by, "best_metric": metric}
            _logger.info("best checkpoint: %s, %s %.4f", best, best_by, metric)
        update_status(paths.status_path, **fields)

    def _write(self, step: int, metrics: dict[str, float], kind: Kind) -> None:
        """On rank 0 writes metrics to the files, to status.json, and as one line to the log."""
        if self._writer is None:
            return
        job = self.job
        self._writer.write(step, metrics, kind)
        speed = f", {metrics['pairs_per_second']:.1f} pairs/s" if kind == "train" else ""
        _logger.info(
            "step %d/%d %s: loss %.4f, margin %.3f, accuracy %.3f%s",
            step, job.num_steps, kind, metrics["loss"], metrics["rewards/margins"],
            metrics["rewards/accuracies"], speed,
        )  # fmt: skip
        if kind == "train":
            seconds = job.config.train.global_batch_size / metrics["pairs_per_second"]
            progress = {"step": step, "num_steps": job.num_steps, "seconds_per_step": seconds}
            update_status(job.paths.status_path, train=progress | metrics)


@contextlib.contextmanager
def open_records(
    job: Job, state: TrainState | None, digests: Mapping[str, str]
) -> Iterator[Records]:
    """The records of an attempt that goes on from `state`, None for a fresh run."""
    pairs, last_step = job.config.train.global_batch_size, state.step if state else 0
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_metrics_writer(job, last_step)) if job.is_first else None
        bar = stack.enter_context(progress_bar("pairs", enabled=job.is_first))
        task = bar.add_task("train", total=job.num_steps * pairs, completed=last_step * pairs)
        yield Records(job, state, digests, writer, bar, task)


def why_ended_early(config: RunConfig, evaluations: Sequence[Evaluation]) -> str | None:
    """Why training ends before the last step, None while it goes on."""
    best_by, patience = config.checkpoint.best_by, config.eval.patience
    if best_by is None or patience is None:
        return None
    return early_stop(evaluations, best_by, patience, config.eval.min_delta)


def _metrics_writer(job: Job, last_step: int) -> MetricsWriter:
    logging_section, paths = job.config.logging, job.paths
    return MetricsWriter(
        paths.metrics_path,
        paths.tensorboard_dir if logging_section.tensorboard else None,
        resume_step=last_step or -1,
        samples_path=paths.samples_path,
        wandb_run=start_run(job.config) if logging_section.wandb else None,
    )
