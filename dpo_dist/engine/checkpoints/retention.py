"""Which checkpoints of a run stand: the newest whole one, those put aside, those pruned.

Only rank 0 calls these; nothing here talks to other ranks.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.engine.checkpoints.commit import Files, put_aside, read_committed, remove
from dpo_dist.engine.checkpoints.train_state import read_train_state
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import COMMIT_NAME, RunDir, step_of

_logger = logging.getLogger(__name__)


def newest_plausible(run: RunDir, refused: dict[Path, str]) -> tuple[Path, Files] | None:
    """The newest checkpoint that passes the cheap checks, and its files; None when there is none.

    Those that do not pass join `refused`, which holds what to skip and why. Raises CheckpointError
    when there are checkpoints and all of them are refused: training must not start afresh beside
    them. Raises OSError when a folder cannot be read.
    """
    for step_dir in _step_dirs(run.checkpoints_dir):
        if step_dir in refused:
            continue
        try:
            files = read_committed(step_dir)
            step = read_train_state(step_dir).step
        except CheckpointError as error:
            if error.transient:
                raise  # the file system's, not the checkpoint's
            refused[step_dir] = error.found
            continue
        if step == step_of(step_dir):
            return step_dir, files
        refused[step_dir] = f"{step_dir} holds step {step}"
    if not refused:
        return None
    reasons = "\n".join(refused.values())
    raise CheckpointError(
        f"none of the {len(refused)} checkpoints in {run.checkpoints_dir} can be used:\n{reasons}",
        "one to go on from",
        "Nothing was moved: put one back from a copy, or move "
        f"{run.checkpoints_dir} away to train anew from the first step.",
    )


def quarantine(run: RunDir, step_dir: Path, reason: str) -> None:
    """Puts a damaged checkpoint aside, if that can be; passing it over is enough."""
    try:
        if step_dir.lstat().st_uid != os.geteuid():
            _logger.warning("checkpoint %s of another user is not used (%s)", step_dir, reason)
            return
        moved = put_aside(step_dir, run.quarantine_dir, reason)
        _logger.warning("checkpoint %s is not used (%s): moved to %s", step_dir, reason, moved)
    except OSError as error:  # a read-only run folder
        _logger.warning("checkpoint %s is not used (%s) and stays: %s", step_dir, reason, error)


def supersede(run: RunDir, step: int) -> None:
    """Puts aside what a run that went back to an earlier step had written further on."""
    for step_dir in _step_dirs(run.checkpoints_dir):
        if (step_of(step_dir) or 0) >= step:
            reason = f"training went back and reached step {step} again"
            moved = put_aside(step_dir, run.quarantine_dir, reason)
            _logger.warning("checkpoint %s moved to %s: %s", step_dir, moved, reason)


def prune(checkpoints_dir: Path, keep: int, ranked: Sequence[int] = ()) -> None:
    """Deletes all but the `keep` newest whole checkpoints; damaged ones do not count.

    Beside them stays the first of the `ranked` steps, best first, that has a whole one.
    """
    whole = []
    for step_dir in _step_dirs(checkpoints_dir):
        try:
            read_committed(step_dir)
            whole.append(step_dir)
        except (CheckpointError, OSError) as error:
            _logger.warning("checkpoint %s is damaged: %s", step_dir, error)
    by_step = {step_of(step_dir): step_dir for step_dir in whole}
    best = next((by_step[step] for step in ranked if step in by_step), None)
    for step_dir in whole[keep:]:
        if step_dir == best:
            continue
        try:
            remove(step_dir)
        except OSError as error:
            _logger.warning("checkpoint %s could not be pruned: %s", step_dir, error)


def best_standing(checkpoints_dir: Path, ranked: Sequence[int]) -> Path | None:
    """The committed checkpoint of the first of the `ranked` steps that has one, best first."""
    by_step = {step_of(step_dir): step_dir for step_dir in marked(checkpoints_dir)}
    return next((by_step[step] for step in ranked if step in by_step), None)


def newest_named(checkpoints_dir: Path) -> Path | None:
    """What is named like the newest checkpoint, whole or not."""
    return next(iter(_step_dirs(checkpoints_dir)), None)


def marked(checkpoints_dir: Path) -> list[Path]:
    """Checkpoints with the marker of a commit, newest first; nothing else is looked at."""
    return [path for path in _step_dirs(checkpoints_dir) if (path / COMMIT_NAME).is_file()]


def _step_dirs(checkpoints_dir: Path) -> list[Path]:
    """Every folder that is named like a checkpoint, newest first."""
    if not checkpoints_dir.is_dir():
        return []
    named = [(step_of(path), path) for path in checkpoints_dir.iterdir() if path.is_dir()]
    return [path for step, path in sorted(named, key=lambda n: n[0] or 0, reverse=True) if step]
