"""Conversion of sharded checkpoints to another number of ranks, through DeepSpeed's converter.

checkpoints/.step-000200.universal/     committed like a checkpoint, removed after the load
    origin.json                         manifest digest of the checkpoint it was made from
    step-000200/                        DeepSpeed's universal layout: one file a parameter
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_dist.engine.checkpoints.commit import commit, record_files, remove, verify
from dpo_dist.engine.checkpoints.train_state import read_train_state
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError, disk_errors_as
from dpo_dist.run.manifest import digest_of_file, fsync_dir, write_json
from dpo_dist.run.run_dir import MANIFEST_NAME, UNIVERSAL_ORIGIN_NAME
from dpo_dist.run.status import POLL_S

ERROR_LINE = re.compile(r"[\w.]*(Error|Exception): ")
# Each extracting process holds the optimizer shard of one rank, each merging one a parameter.
EXTRACTING_PROCESSES = 2
MERGING_PROCESSES = 2
CONVERTIBLE = "adamw"  # its two moments are what the converter looks for, by name


def needs_conversion(step_dir: Path | None, world_size: int) -> bool:
    """Whether `world_size` ranks can read this checkpoint only after a conversion.

    The DeepSpeed config then needs checkpoint.load_universal before the engine is built. Stage 0
    has no shards, so any number of ranks reads it. Raises CheckpointError when the state of the
    optimizer cannot be converted.
    """
    if step_dir is None:
        return False
    state = read_train_state(step_dir)
    if state.zero_stage == 0 or state.world_size == world_size:
        return False
    optimizer = state.digests.get("train.optimizer", CONVERTIBLE)
    if optimizer != CONVERTIBLE:
        raise CheckpointError(
            f"{step_dir} holds the state of {optimizer} on {state.world_size} ranks, and DeepSpeed "
            f"converts that of {CONVERTIBLE} only",
            f"{state.world_size} ranks, not {world_size}",
            f"Continue on {state.world_size} ranks.",
        )
    return True


def prepare_universal(step_dir: Path) -> Path:
    """Converts a verified checkpoint on rank 0 and returns the folder to load, on every rank.

    A finished conversion of the same checkpoint is used again. Takes four times the checkpoint's
    size of disk traffic and twice its size of space. Raises CheckpointError on every rank.
    """
    target = universal_dir(step_dir)
    reusable = collectives.broadcast(collectives.is_first() and _is_reusable(target, step_dir))
    if not reusable:
        _convert(step_dir, target)
    folder = target / step_dir.name
    blind = [rank for rank, seen in enumerate(collectives.gather(folder.is_dir())) if not seen]
    if blind:
        raise CheckpointError(
            f"rank {blind[0]} does not see {folder} ({len(blind)} ranks)",
            "a run folder that every node sees",
            "Put run.dir on a shared file system.",
        )
    return folder


def discard_universal(step_dir: Path) -> None:
    """Removes the conversion once every rank has read it."""
    collectives.barrier()
    if collectives.is_first():
        with contextlib.suppress(OSError):
            remove(universal_dir(step_dir))


def universal_dir(step_dir: Path) -> Path:
    """Where the conversion of a checkpoint lies while it is needed."""
    return step_dir.parent / f".{step_dir.name}.universal"


def _is_reusable(target: Path, step_dir: Path) -> bool:
    try:
        verify(target)
        origin = json.loads((target / UNIVERSAL_ORIGIN_NAME).read_text())
    except (CheckpointError, OSError, ValueError):
        return False
    return origin == _origin(step_dir)


def _origin(step_dir: Path) -> dict[str, str]:
    return {"manifest": digest_of_file(step_dir / MANIFEST_NAME)}


def _convert(step_dir: Path, target: Path) -> None:
    """Rank 0 runs DeepSpeed's converter while the others hear from it all the time."""
    partial: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def start() -> None:
        nonlocal partial, process
        with _failure_named(step_dir):
            partial = _fresh_folder(step_dir)
            process = _start_converter(step_dir, partial)

    def finish() -> None:
        assert process is not None and partial is not None, "rank 0 has started it"
        with _failure_named(step_dir):
            _finish(process, partial, step_dir, target)

    try:
        collectives.on_first(start)
        # A conversion may take longer than the process group waits for one exchange.
        while collectives.broadcast(process is not None and process.poll() is None):
            time.sleep(POLL_S if process else 0)
        collectives.on_first(finish)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _fresh_folder(step_dir: Path) -> Path:
    """A name of its own: the converter of a killed attempt may still be writing to another."""
    prefix = f".{step_dir.name}.universal."
    for leftover in step_dir.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=step_dir.parent, prefix=prefix))


def _start_converter(step_dir: Path, partial: Path) -> subprocess.Popen[bytes]:
    # A process of its own: it forks workers, which one with a live process group must not do.
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(step_dir), "--output_folder", str(partial / step_dir.name),
        "--num_extract_workers", str(EXTRACTING_PROCESSES),
        "--num_merge_workers", str(MERGING_PROCESSES),
        "--inject_missing_state",
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (partial / "converter.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _finish(process: subprocess.Popen[bytes], partial: Path, step_dir: Path, target: Path) -> None:
    if process.returncode:
        lines = (partial / "converter.log").read_text(errors="replace").strip().splitlines()
        # libraries may still say something after the traceback
        errors = [line for line in lines if ERROR_LINE.match(line)]
        reason = (errors or lines or ["?"])[-1]
        raise OSError(f"the converter ended with {process.returncode}: {reason}")
    write_json(partial / UNIVERSAL_ORIGIN_NAME, _origin(step_dir))
    commit(partial, record_files(partial))
    if target.exists():
        remove(target)
    os.replace(partial, target)
    fsync_dir(target.parent)


def _failure_named(step_dir: Path) -> contextlib.AbstractContextManager[None]:
    num_ranks = read_train_state(step_dir).world_size
    return disk_errors_as(
        CheckpointError,
        f"{step_dir} of {num_ranks} ranks could not be converted",
        "a converter that ends well, and free space of twice the checkpoint's size",
        f"Fix this, or continue on {num_ranks} ranks.",
    )
