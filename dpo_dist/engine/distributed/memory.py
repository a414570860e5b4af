"""Memory that a rank has needed, and that its host has left."""

import contextlib
import resource
from pathlib import Path

import psutil
import torch

from dpo_dist.engine.distributed import collectives
from dpo_dist.planning.sizes import GIB

CGROUPS = Path("/sys/fs/cgroup")


def peak_memory_gib(device: torch.device) -> float:
    """GiB of the fullest rank; all ranks call together.

    On GPUs the most that tensors held since the last call. Elsewhere the most memory the process
    ever held, which includes libraries and never sinks.
    """
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return collectives.max_over_ranks(num_bytes / GIB, device)


def free_host_bytes() -> int:
    """Memory that this process may still take: what is free, and what its control groups allow.

    Slurm and Kubernetes limit a job by a control group, whose file cache counts as free.
    """
    free: float = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in lines if line.startswith("0::"))
        group = CGROUPS / own.lstrip("/")
        for folder in (group, *group.parents):
            free = min(free, _left_in(folder))
    return int(free)


def _left_in(cgroup: Path) -> float:
    """Bytes that a version 2 control group has left, infinity without a limit."""
    limit = cgroup / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return float("inf")
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])
    return int(most) - used
