"""Memory that a rank has needed."""

import resource

import torch

from dpo_dist.engine.distributed import collectives
from dpo_dist.planning.sizes import GIB


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
