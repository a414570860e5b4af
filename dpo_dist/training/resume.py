"""Whether a training run begins, goes on, or has ended; found out without a model."""

import logging
from collections.abc import Mapping
from pathlib import Path

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.data.pairs import Pairs
from dpo_dist.engine.checkpoints.retention import marked
from dpo_dist.engine.checkpoints.train_state import check_resume, read_train_state
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.run_dir import RunDir
from dpo_dist.training.records import why_ended_early

_logger = logging.getLogger(__name__)


def input_digests(models: RunModels, pairs: Pairs) -> dict[str, str]:
    """What a resume must find unchanged but for the reference: settings one by one, and digests.

    Rank 0 alone reads the weights, which are many when no digest of them is cached.
    """
    return collectives.on_first(
        lambda: (
            training_identity(models.config) | {"pairs": pairs.digest, "model": models.start_digest}
        )
    )


def ended_at(models: RunModels, digests: Mapping[str, str], num_steps: int) -> Path | None:
    """The checkpoint that training ended with, if it has ended; rank 0 looks.

    Raises CheckpointError when it was trained with other settings or inputs.
    """
    if models.config.checkpoint.resume != "auto":
        return None
    return collectives.on_first(lambda: _last_checkpoint(models, digests, num_steps))


def _last_checkpoint(models: RunModels, digests: Mapping[str, str], num_steps: int) -> Path | None:
    last_dir = next(iter(marked(RunDir(models.config.run.dir).checkpoints_dir)), None)
    if last_dir is None:
        return None
    try:
        state = read_train_state(last_dir)
    except CheckpointError:
        return None  # damaged: choosing what to resume from deals with it
    if state.step != num_steps and not why_ended_early(models.config, state.evaluations):
        return None
    reference = {"reference": state.digests["reference"]}  # needs the model's layout to look up
    check_resume(last_dir, state, {**digests, **reference})
    _logger.info("train: finished, %s", last_dir)
    return last_dir
