"""Whether a training run begins, goes on, or has ended; found out without a model."""

import logging
from collections.abc import Mapping
from pathlib import Path

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.data.pairs import Pairs
from dpo_dist.engine.checkpoints.train_state import check_resume, read_train_state
from dpo_dist.engine.distributed import collectives
from dpo_dist.model_files.of_run import RunModels
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


def has_ended(models: RunModels, digests: Mapping[str, str], num_steps: int, resume: Path) -> bool:
    """Whether training ended with the verified checkpoint `resume`; rank 0 looks.

    Raises CheckpointError when it was trained with other settings or inputs.
    """
    return collectives.on_first(lambda: _has_ended(models, digests, num_steps, resume))


def _has_ended(models: RunModels, digests: Mapping[str, str], num_steps: int, resume: Path) -> bool:
    state = read_train_state(resume)
    if state.step != num_steps and not why_ended_early(models.config, state.evaluations):
        return False
    reference = {"reference": state.digests["reference"]}  # needs the model's layout to look up
    check_resume(resume, state, {**digests, **reference})
    _logger.info("train: finished, %s", resume)
    return True
