"""What a training run leaves behind: metrics, evaluations, checkpoints, samples.

Every rank takes part in making them; rank 0 writes them down and tells.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.progress import Progress, TaskID

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.checkpoints.retention import best_standing
from dpo_dist.engine.distributed import collectives
from dpo_dist.metrics.evaluations import Evaluation, early_stop, ranked_steps, record
from dpo_dist.metrics.wandb_log import start_run
from dpo_dist.metrics.writer import Kind, MetricsWriter
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.run_dir import step_of
from dpo_dist.run.status import update_status
from dpo_dist.training.checkpointing import save_checkpoint
from dpo_dist.training.due import checkpoint_due, evaluation_due, report_due, samples_due
from dpo_dist.training.evaluation import answer_prompts, evaluate
from dpo_dist.training.job import Job
from dpo_dist.training.speed import speed_metrics
from dpo_dist.training.sums import StepSums

_logger = logging.getLogger(__name__)


class Records:
    """The records of one attempt; `evaluations` are those of the run so far, by step."""

    def __init__(
        self, job: Job, evaluations: Sequence[Evaluation], digests: Mapping[str, str],
        writer: MetricsWriter | None, bar: Progress, task: TaskID,
    ) -> None:  # fmt: skip
        self.job, self.digests, self.evaluations = job, digests, list(evaluations)
        self._writer, self._bar, self._task = writer, bar, task
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
                self.save(last_step)
        self._since = time.monotonic()
        return self.ended_early is not None

    def report(
        self, step: int, sums: StepSums, grad_norm: float, learning_rate: float, stopping: bool
    ) -> None:
        """Adds a step to the window and, when due, writes the window's means."""
        config, ending = self.job.config, step == self.job.num_steps
        self._window += sums
        now = time.monotonic()
        if report_due(step, config.logging.every_steps, ending=ending, stopping=stopping):
            metrics = self._window.means() | speed_metrics(
                self.job, step, self._window, now - self._since
            )
            metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
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
        if checkpoint_due(step, config.checkpoint.every_steps, **due):
            self.save(step)
        if samples_due(step, config.eval.samples_every_steps, **due):
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

    def save(self, step: int) -> None:
        """Commits a checkpoint."""
        path = save_checkpoint(self.job, step, self.digests, self.evaluations)
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
        due = evaluation_due(step, job.config.eval.every_steps, job.num_steps)
        return due and not made and len(job.held_out.pairs) > 0

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
    job: Job, last_step: int, evaluations: Sequence[Evaluation], digests: Mapping[str, str]
) -> Iterator[Records]:
    """The records of an attempt that goes on after `last_step`, 0 for a fresh run."""
    pairs = job.config.train.global_batch_size
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_metrics_writer(job, last_step)) if job.is_first else None
        bar = stack.enter_context(progress_bar("pairs", enabled=job.is_first))
        task = bar.add_task("train", total=job.num_steps * pairs, completed=last_step * pairs)
        yield Records(job, evaluations, digests, writer, bar, task)


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
