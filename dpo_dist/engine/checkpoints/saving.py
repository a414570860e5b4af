"""Sharded checkpoints: written in two phases, while training goes on or before it does.

1. Every rank writes its files into .step-000200.partial and takes their hashes on the way.
2. All ranks agree that their part is on disk, else all raise and nothing else has changed.
3. Rank 0 commits the folder and renames it; only then older ones are pruned.

The temporary name keeps a folder that is being written apart from one that is damaged, and lets a
step be written again without touching its older version first. In the background only files are
written: whatever the ranks agree on, they agree on in their main threads, between two steps.

K probe pairs.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from dpo_dist.config.training_section import HeldOutMetric
from dpo_dist.engine.checkpoints.commit import Files, commit, remove_leftovers
from dpo_dist.engine.checkpoints.host_copies import HostCopies
from dpo_dist.engine.checkpoints.retention import prune, supersede
from dpo_dist.engine.checkpoints.shard_writer import ShardWriter, Written
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import rng_states
from dpo_dist.errors import CheckpointError
from dpo_dist.metrics.evaluations import ranked_steps
from dpo_dist.reference.arrays import IntArray, LogpArray
from dpo_dist.run.manifest import fsync_dir
from dpo_dist.run.run_dir import PROBE_NAME, TRAIN_STATE_NAME, RunDir, rng_name

# Writing may take this long: what a disk that works never needs, for one that hangs.
WRITING_S, SLOWEST_BYTES_S = 600.0, 20e6


@dataclass
class Saving:
    """A checkpoint of which this rank's files are being written."""

    run: RunDir
    state: TrainState
    partial: Path
    writer: ShardWriter
    _failed: list[BaseException] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        if self.writer.is_behind:
            # a daemon: a file system that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write; it may have failed."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self, *, keep: int, best_by: HeldOutMetric | None = None) -> Path:
        """Waits for all ranks, commits, and prunes to the `keep` newest; returns the folder.

        The best by `best_by` among the evaluations in `state` is kept too. Raises CheckpointError
        on every rank, naming the rank that failed and why, and leaves the earlier checkpoints as
        they were.
        """
        assert keep >= 2, f"keep={keep}, expected at least 2"
        limit_s = WRITING_S + self.writer.num_bytes / SLOWEST_BYTES_S
        files = self._all_files(collectives.polled(self._joined, limit_s, f"write {self.partial}"))
        final = self.run.checkpoint_dir(self.state.step)
        _written_by_first(
            self.partial, lambda: _commit(self.run, self.partial, final, files, self.state.step)
        )
        if collectives.is_first():
            prune(self.run.checkpoints_dir, keep, ranked_steps(self.state.evaluations, best_by))
        return final

    def _write(self) -> None:
        try:
            self.writer.catch_up()
        except BaseException as error:
            self._failed.append(error)

    def _joined(self) -> Written:
        if self._thread is not None:
            self._thread.join()
        for error in self._failed:
            raise error
        return self.writer.written

    def _all_files(self, reports: list[Written]) -> Files:
        failed = {rank: report for rank, report in enumerate(reports) if report.failure}
        if failed:
            if collectives.is_first():
                shutil.rmtree(self.partial, ignore_errors=True)
            reasons = (f"rank {rank}: {report.failure}" for rank, report in failed.items())
            error = _not_written(self.partial, "; ".join(reasons))
            error.transient = all(report.transient for report in failed.values())
            raise error
        return {name: record for report in reports for name, record in report.files.items()}


def begin(
    engine: Any,
    checkpoints_dir: Path,
    state: TrainState,
    probe_indices: IntArray,
    probe_logps: LogpArray,
    copies: HostCopies | None = None,
) -> Saving:
    """Begins a checkpoint of all ranks, which is none until it is committed; all call together.

    `probe_indices` is (K,), `probe_logps` (K, 2). Frozen parameters are not written: they are the
    base model's, whose digest a resume compares. With `copies` it returns as soon as the shards are
    copied into them, as far as they have room, and the files are written behind; at most one
    checkpoint at a time. Raises CheckpointError on every rank when there is no folder to write to.
    """
    run = RunDir.of_checkpoints(checkpoints_dir)
    partial = checkpoints_dir / f".{run.checkpoint_dir(state.step).name}.partial"
    _written_by_first(partial, lambda: _make_partial(checkpoints_dir, partial))
    frozen = {
        name
        for name, parameter in engine.module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    writer = ShardWriter(partial, frozen, copies)
    with _saving_through(engine, writer):
        engine.save_checkpoint(
            str(partial.parent), tag=partial.name, save_latest=False, exclude_frozen_parameters=True
        )
    rank, _ = collectives.place()
    generators = rng_states()
    writer.write(partial / rng_name(rank), lambda stream: torch.save(generators, stream))
    if collectives.is_first():
        probe = {
            "pair_index": torch.from_numpy(probe_indices),
            "logps": torch.from_numpy(probe_logps),
        }
        where, numbers = state.to_json().encode(), safetensors.save(probe)
        writer.write(partial / TRAIN_STATE_NAME, lambda stream: stream.write(where))
        writer.write(partial / PROBE_NAME, lambda stream: stream.write(numbers))
    return Saving(run, state, partial, writer)


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
    """Commits a checkpoint and returns its folder; see `begin` and `Saving.commit`."""
    saving = begin(engine, checkpoints_dir, state, probe_indices, probe_logps)
    return saving.commit(keep=keep, best_by=best_by)


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


def _not_written(partial: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{partial} could not be written ({reason})",
        "a writable folder with free space",
        "Fix this and start again: training continues from the checkpoint before.",
    )
