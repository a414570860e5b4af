"""Sharded checkpoints: verified before they are read. `saving` writes them.

    checkpoints/step-000200/
        *_optim_states.pt, *_model_states.pt    DeepSpeed's shards, trainable parameters only
        rng_rank_00000.pt ...                   random generators of every rank
        train_state.json, probe.safetensors     where training stood; log-probs of a few pairs
        MANIFEST.json, COMMITTED                see commit.py

K probe pairs.
"""

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import torch as safetensors

from dpo_dist.engine.checkpoints.commit import (
    Files,
    check_pickles,
    find_changed,
    read_committed,
)
from dpo_dist.engine.checkpoints.resharding import load_resharded, needs_resharding
from dpo_dist.engine.checkpoints.retention import newest_plausible, quarantine
from dpo_dist.engine.checkpoints.shard_loader import load_shards
from dpo_dist.engine.checkpoints.train_state import (
    TrainState,
    check_resume,
    check_stage,
    read_train_state,
)
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import restore_rng
from dpo_dist.errors import CheckpointError, disk_errors_as, is_transient
from dpo_dist.reference.arrays import IntArray, LogpArray
from dpo_dist.run.run_dir import PROBE_NAME, RunDir, rng_name

Value = TypeVar("Value")
# A check may take this long: what a disk that works never needs, for one that hangs.
READING_S, SLOWEST_BYTES_S = 600.0, 20e6


def choose_resume(checkpoints_dir: Path, resume: Path | Literal["auto"]) -> Path | None:
    """The checkpoint to continue from: the newest that verifies, or the one that is named.

    None only under "auto" when there is none. Raises CheckpointError on every rank when the named
    folder is not a whole checkpoint: a mistyped path must not start a fresh run.
    """
    if resume == "auto":
        return newest_committed(checkpoints_dir)
    files = _read_by_first(resume, lambda: read_committed(resume))
    changed = _find_changed_together(resume, files)
    if changed:
        raise CheckpointError(changed, "the committed content", "Resume from another checkpoint.")
    return resume


def newest_committed(checkpoints_dir: Path) -> Path | None:
    """The newest checkpoint that verifies in full, None when there is none; for all ranks.

    Sizes are compared for every candidate, contents for the one that is chosen, each rank reading
    its share of the files. Damaged ones are moved to quarantine with the reason. Raises
    CheckpointError on every rank when all are damaged, which moves none, and when a file cannot
    be read.
    """
    run, refused = RunDir.of_checkpoints(checkpoints_dir), dict[Path, str]()
    while True:
        candidate = _read_by_first(checkpoints_dir, lambda: newest_plausible(run, refused))
        if candidate is None:
            return None
        step_dir, files = candidate
        changed = _find_changed_together(step_dir, files)
        if not changed:
            break
        refused[step_dir] = changed
    if collectives.is_first():
        for damaged, reason in refused.items():
            quarantine(run, damaged, reason)
    return step_dir


def check_ours(step_dir: Path, trusted: Container[int]) -> None:
    """Raises CheckpointError on every rank unless the pickles of a checkpoint may be opened."""
    _read_by_first(step_dir, lambda: check_pickles(step_dir, trusted))


def load(engine: Any, step_dir: Path, digests_now: Mapping[str, str]) -> TrainState:
    """Puts a verified checkpoint into a fresh engine; returns where training stood.

    Restores weights, optimizer, schedule and, on the same number of ranks, the random generators.
    On another number each rank reads its share of the shards, for which the engine must have been
    built with checkpoint.load_universal (`needs_resharding` tells). Raises CheckpointError on every
    rank when the run differs from the one that wrote it.
    """
    state = read_train_state(step_dir)
    check_resume(step_dir, state, digests_now)
    check_stage(step_dir, state, engine.zero_optimization_stage())
    rank, world_size = collectives.place()
    reshard = needs_resharding(step_dir, world_size)
    universal = engine.load_universal_checkpoint()
    assert universal == reshard, f"load_universal is {universal}, expected {reshard}"
    if reshard:
        load_resharded(engine, step_dir)
    else:
        load_shards(engine, step_dir)
    if state.world_size == world_size:
        restore_rng(torch.load(step_dir / rng_name(rank), weights_only=True))
    return state


def read_probe(step_dir: Path) -> tuple[IntArray, LogpArray]:
    """(pair indices (K,), log-probs of chosen and rejected (K, 2)) of a verified checkpoint."""
    tensors = safetensors.load_file(step_dir / PROBE_NAME)
    return tensors["pair_index"].numpy(), tensors["logps"].numpy()


def _find_changed_together(step_dir: Path, files: Files) -> str | None:
    """What is damaged, if anything; every rank reads its share of the files."""
    rank, world_size = collectives.place()
    share = sorted(files)[rank::world_size]

    def look() -> tuple[list[str], str | None, bool]:
        try:
            return find_changed(step_dir, files, share), None, False
        except OSError as error:
            found = f"rank {rank} cannot read {error.filename} ({error.strerror})"
            return [], found, is_transient(error)

    total = sum(record.size for record in files.values())
    reports = collectives.polled(look, READING_S + total / SLOWEST_BYTES_S, f"read {step_dir}")
    for _, problem, passing in reports:
        if problem:
            error = CheckpointError(
                problem, "files that every rank can read", "Check the file system and run.dir."
            )
            error.transient = passing
            raise error
    return next((found[0] for found, _, _ in reports if found), None)


def _read_by_first(path: Path, work: Callable[[], Value]) -> Value:
    """What rank 0 reads, on every rank; its OSError becomes a CheckpointError on every rank."""

    def guarded() -> Value:
        with disk_errors_as(
            CheckpointError, f"cannot read {path}", "a readable checkpoint",
            "Check the path and its permissions.",
        ):  # fmt: skip
            return work()

    return collectives.on_first(guarded)
