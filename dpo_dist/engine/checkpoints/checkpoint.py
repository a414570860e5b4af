"""Sharded checkpoints: written in two phases, verified before they are read.

    checkpoints/step-000200/
        *_optim_states.pt, *_model_states.pt    DeepSpeed's shards, trainable parameters only
        rng_rank_00000.pt ...                   random generators of every rank
        train_state.json, probe.safetensors     where training stood; log-probs of a few pairs
        MANIFEST.json, COMMITTED                see commit.py

1. Every rank writes its files into .step-000200.partial and takes their hashes on the way.
2. All ranks agree that their part is on disk, else all raise and nothing else has changed.
3. Rank 0 commits the folder and renames it; only then older ones are pruned.

The temporary name keeps a folder that is being written apart from one that is damaged, and lets a
step be written again without touching its older version first.

K probe pairs.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import torch as safetensors

from dpo_dist.config.training_section import HeldOutMetric
from dpo_dist.engine.checkpoints.commit import (
    Files,
    check_pickles,
    commit,
    find_changed,
    read_committed,
    remove_leftovers,
)
from dpo_dist.engine.checkpoints.resharding import load_resharded, needs_resharding
from dpo_dist.engine.checkpoints.retention import newest_plausible, prune, quarantine, supersede
from dpo_dist.engine.checkpoints.shard_loader import load_shards
from dpo_dist.engine.checkpoints.shard_writer import ShardWriter
from dpo_dist.engine.checkpoints.train_state import (
    TrainState,
    check_resume,
    check_stage,
    read_train_state,
)
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import restore_rng, rng_states
from dpo_dist.errors import CheckpointError, disk_errors_as, is_transient
from dpo_dist.metrics.evaluations import ranked_steps
from dpo_dist.reference.arrays import IntArray, LogpArray
from dpo_dist.run.manifest import fsync_dir
from dpo_dist.run.run_dir import PROBE_NAME, TRAIN_STATE_NAME, RunDir, rng_name

Value = TypeVar("Value")
# A check may take this long: what a disk that works never needs, for one that hangs.
READING_S, SLOWEST_BYTES_S = 600.0, 20e6


def save(
    engine: Any,
    checkpoints_dir: Path,
    state: TrainState,
    probe_indices: IntArray,
    probe_logps: LogpArray,
    *,
    keep: int,
    best_by: HeldOutMetric | None = None,
) -> Path:
    """Commits a checkpoint of all ranks and prunes to the `keep` newest; returns its folder.

    The best by `best_by` among the evaluations in `state` is kept too. `probe_indices` is (K,),
    `probe_logps` (K, 2). Frozen parameters are not written: they are the base model's, whose
    digest a resume compares. Raises CheckpointError on every rank, naming the rank that failed
    and why, and leaves the earlier checkpoints as they were.
    """
    assert keep >= 2, f"keep={keep}, expected at least 2"
    run = _run_dir(checkpoints_dir)
    final = run.checkpoint_dir(state.step)
    partial = checkpoints_dir / f".{final.name}.partial"
    _written_by_first(partial, lambda: _make_partial(checkpoints_dir, partial))
    files = _write_together(engine, partial, state, probe_indices, probe_logps)
    _written_by_first(partial, lambda: _commit(run, partial, final, files, state.step))
    if collectives.is_first():
        prune(checkpoints_dir, keep, ranked_steps(state.evaluations, best_by))
    return final


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
    run, refused = _run_dir(checkpoints_dir), dict[Path, str]()
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


def _write_together(
    engine: Any,
    partial: Path,
    state: TrainState,
    probe_indices: IntArray,
    probe_logps: LogpArray,
) -> Files:
    """Every rank writes its part; the records of all files, or CheckpointError on every rank."""
    frozen = {
        name
        for name, parameter in engine.module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    writer = ShardWriter(partial, frozen)
    if not partial.is_dir():
        writer.failure = f"{partial} is not visible, run.dir must be on a shared file system"
    with _saving_through(engine, writer):
        engine.save_checkpoint(
            str(partial.parent), tag=partial.name, save_latest=False, exclude_frozen_parameters=True
        )
    rank, _ = collectives.place()
    writer.write(partial / rng_name(rank), lambda stream: torch.save(rng_states(), stream))
    if collectives.is_first():
        probe = {
            "pair_index": torch.from_numpy(probe_indices),
            "logps": torch.from_numpy(probe_logps),
        }
        writer.write(partial / TRAIN_STATE_NAME, lambda s: s.write(state.to_json().encode()))
        writer.write(partial / PROBE_NAME, lambda s: s.write(safetensors.save(probe)))
    reports = collectives.gather((writer.files, writer.failure, writer.transient))
    failed = {rank: report for rank, report in enumerate(reports) if report[1]}
    if failed:
        if collectives.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        reasons = (f"rank {rank}: {failure}" for rank, (_, failure, _) in failed.items())
        error = _not_written(partial, "; ".join(reasons))
        error.transient = all(transient for _, _, transient in failed.values())
        raise error
    return {name: record for files, _, _ in reports for name, record in files.items()}


@contextlib.contextmanager
def _saving_through(engine: Any, writer: ShardWriter) -> Iterator[None]:
    """DeepSpeed's own writer and its recovery script put aside, on all ranks, for one save."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # Would write a program beside the checkpoints, and fail between collectives on a full disk.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


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


def _make_partial(checkpoints_dir: Path, partial: Path) -> None:
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(checkpoints_dir, "step-")
    partial.mkdir()


def _commit(run: RunDir, partial: Path, final: Path, files: Files, step: int) -> None:
    commit(partial, files)
    supersede(run, step)
    os.replace(partial, final)
    fsync_dir(final.parent)


def _written_by_first(partial: Path, work: Callable[[], None]) -> None:
    """File work of rank 0; its OSError becomes a CheckpointError on every rank."""

    def guarded() -> None:
        try:
            work()
        except OSError as error:
            raise _not_written(partial, f"rank 0: {error.strerror}") from error

    collectives.on_first(guarded)


def _read_by_first(path: Path, work: Callable[[], Value]) -> Value:
    """What rank 0 reads, on every rank; its OSError becomes a CheckpointError on every rank."""

    def guarded() -> Value:
        with disk_errors_as(
            CheckpointError, f"cannot read {path}", "a readable checkpoint",
            "Check the path and its permissions.",
        ):  # fmt: skip
            return work()

    return collectives.on_first(guarded)


def _not_written(partial: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{partial} could not be written ({reason})",
        "a writable folder with free space",
        "Fix this and start again: training continues from the checkpoint before.",
    )


def _run_dir(checkpoints_dir: Path) -> RunDir:
    run = RunDir(checkpoints_dir.parent)
    assert run.checkpoints_dir == checkpoints_dir, f"{checkpoints_dir} is not {run.checkpoints_dir}"
    return run
