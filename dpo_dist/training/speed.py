"""How fast training is, and what it needs: the metrics beside the means over pairs."""

import torch

from dpo_dist.engine.distributed.memory import peak_memory_gib
from dpo_dist.planning.flops import peak_flops, step_flops, utilization
from dpo_dist.planning.setup import ModelShape
from dpo_dist.training.job import Job
from dpo_dist.training.sums import StepSums


def speed_metrics(job: Job, step: int, window: StepSums, seconds: float) -> dict[str, float]:
    """Progress after a step, and the speed of the window's steps, which took so many seconds.

    tokens_per_second and pairs_per_second are of all ranks together, tokens_per_second_per_gpu of
    one; mfu is there where the GPU's peak is known. All ranks call together.
    """
    consumed, world_size = step * job.config.train.global_batch_size, job.topology.world_size
    metrics = {
        "epoch": consumed / len(job.train.pairs),
        "consumed_pairs": float(consumed),
        "pairs_per_second": window.num_pairs / seconds,
        "tokens_per_second": window.tokens / seconds,
        "tokens_per_second_per_gpu": window.tokens / seconds / world_size,
        "tokens_saved_by_sharing": 1 - window.tokens / window.tokens_unshared,
        "peak_memory_gib": peak_memory_gib(job.device),
    }
    peak = peak_of(job.device, job.config.model.dtype)
    if peak is not None and job.shape is not None:
        metrics["mfu"] = model_flops_utilization(job.shape, window, seconds, peak * world_size)
    return metrics


def model_flops_utilization(
    shape: ModelShape, window: StepSums, seconds: float, peak: float
) -> float:
    """Model FLOPs a second over the `peak` of all GPUs together, from 0 to 1.

    What is recomputed does not count; planning/flops.py has the formula and its sources.
    """
    flops = step_flops(shape, int(window.tokens), int(window.tokens_scored), checkpointing=False)
    return utilization(flops.model, seconds, peak, 1)


def peak_of(device: torch.device, dtype: str) -> float | None:
    """Dense peak FLOPs per second of a device, None where the table of GPUs does not have it."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), dtype)
