"""Some steps under torch's profiler: a trace of every rank, and on GPUs what held its memory."""

import logging
from collections.abc import Iterator

import torch

from dpo_dist.training.job import Job

_logger = logging.getLogger(__name__)
MAX_ALLOCATIONS = 1_000_000  # events of a memory snapshot; the oldest are dropped


def profiled(job: Job, steps: range) -> Iterator[int]:
    """Yields the steps; those of train.profile_steps, first to last, run under the profiler.

    Every rank writes RUN/profile/rank0000.trace.json for Perfetto or chrome://tracing, and on GPUs
    rank0000.memory.pickle for pytorch.org/memory_viz. Also when training ends in between.
    """
    if job.config.train.profile_steps is None:
        yield from steps
        return
    first, last = job.config.train.profile_steps
    profiler: torch.profiler.profile | None = None
    try:
        for step in steps:
            if profiler is not None and step > last:
                profiler = _stop(job, profiler)
            if first <= step <= last and profiler is None:
                profiler = _start(job)
            yield step
    finally:
        if profiler is not None:
            _stop(job, profiler)


def _start(job: Job) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    profiler.start()
    return profiler


def _stop(job: Job, profiler: torch.profiler.profile) -> None:
    """Writes what was recorded since the start."""
    profiler.stop()
    rank, paths = job.topology.rank, job.paths
    path = paths.trace_path(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if job.device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(paths.memory_snapshot_path(rank)))
        torch.cuda.memory._record_memory_history(enabled=None)
    _logger.info("profile: %s, %.1f MB", path, path.stat().st_size / 1e6)
