"""Which checkpoint an export is made from: one that is asked for, or what training ended with."""

import logging
from pathlib import Path

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import num_steps
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints.commit import read_committed, verify
from dpo_dist.engine.checkpoints.retention import best_standing, marked, newest_named
from dpo_dist.engine.checkpoints.train_state import TrainState, read_train_state
from dpo_dist.errors import CheckpointError, disk_errors_as
from dpo_dist.metrics.evaluations import ranked_steps
from dpo_dist.run.run_dir import RunDir
from dpo_dist.training.records import why_ended_early

_logger = logging.getLogger(__name__)
BY_NAME = "export.checkpoint"
TRAIN_ON = "Run `dpo-dist train`, which goes on from the last one that is whole."


def choose_checkpoint(config: RunConfig) -> Path:
    """The checkpoint to export, every file of it read and found as it was committed.

    Unless it is asked for by name it is the last or the best one of a training that ended: what is
    exported, verified and pushed by itself must not be an older one than its user thinks. Nothing
    is moved. Raises CheckpointError.
    """
    checkpoints_dir = RunDir(config.run.dir).checkpoints_dir
    asked, best_by = config.export.checkpoint, config.checkpoint.best_by
    with disk_errors_as(
        CheckpointError, f"cannot read {checkpoints_dir}", "readable checkpoints",
        "Check the path and its permissions.",
    ):  # fmt: skip
        if asked.startswith("step-"):
            verify(checkpoints_dir / asked)
            return checkpoints_dir / asked
        last_dir = _end_of_training(config, checkpoints_dir)
        if best_by is None or asked == "newest":
            _check_whole(last_dir, TRAIN_ON)
            return last_dir
        ranked = ranked_steps(read_train_state(last_dir).evaluations, best_by)
        best_dir = best_standing(checkpoints_dir, ranked)
        if best_dir is None:
            raise CheckpointError(
                f"{checkpoints_dir} holds no checkpoint with an evaluation by {best_by}",
                "one to compare",
                f"Set {BY_NAME} to newest.",
            )
        _check_whole(best_dir, f"Set {BY_NAME} to newest.")
    _logger.info("export: %s, best of %d evaluations by %s", best_dir, len(ranked), best_by)
    return best_dir


def _end_of_training(config: RunConfig, checkpoints_dir: Path) -> Path:
    """The checkpoint that training ended with; raises CheckpointError when there is none."""
    last_dir = newest_named(checkpoints_dir)
    if last_dir is None:
        raise CheckpointError(
            f"{checkpoints_dir} holds no committed checkpoint",
            "one to export",
            "Run `dpo-dist train` first.",
        )
    try:
        read_committed(last_dir)
        state = read_train_state(last_dir)
    except CheckpointError as error:
        raise _not_the_end(error.found, TRAIN_ON, _another(last_dir)) from None
    last_step = _last_step(config, state)
    if state.step < last_step and not why_ended_early(config, state.evaluations):
        found = f"{last_dir} is the newest, of step {state.step} of {last_step}"
        raise _not_the_end(found, TRAIN_ON, last_dir)
    return last_dir


def _last_step(config: RunConfig, state: TrainState) -> int:
    """The step that the training of a checkpoint ends with, by what it was trained with."""
    trained = training_identity(config) | dict(state.digests)
    num_pairs = len(open_pairs(RunDir(config.run.dir).pairs_dir, "train"))
    steps = num_steps(
        num_pairs, int(trained["train.global_batch_size"]), float(trained["train.num_epochs"])
    )
    max_steps = trained["train.max_steps"]
    return steps if max_steps == str(None) else min(steps, int(max_steps))


def _check_whole(step_dir: Path, remedy: str) -> None:
    try:
        verify(step_dir)
    except CheckpointError as error:
        raise _not_the_end(error.found, remedy, _another(step_dir)) from None


def _another(step_dir: Path) -> Path | None:
    """The newest checkpoint beside a damaged one."""
    return next((path for path in marked(step_dir.parent) if path != step_dir), None)


def _not_the_end(found: str, remedy: str, named: Path | None) -> CheckpointError:
    by_name = f" Or ask for one by name: {BY_NAME}={named.name}." if named else ""
    return CheckpointError(found, "the checkpoint of the end of training, whole", remedy + by_name)
