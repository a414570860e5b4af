"""DeepSpeed engines: the only place that starts one, steps it and takes it down."""

import gc
import math
from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.sharding.optimizers import make_optimizer


def start_training(
    module: nn.Module, ds_config: dict[str, Any], train: TrainSection, num_steps: int
) -> Any:
    """A DeepSpeed engine around `module` with the optimizer and the learning-rate schedule."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=make_optimizer(module, ds_config, train),
        lr_scheduler=lambda optimizer: make_schedule(optimizer, train, num_steps),
        config=ds_config,
        dist_init_required=False,
    )
    return engine


def start_inference(module: nn.Module, ds_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine that gathers ZeRO-3 partitions on the fly and holds no optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=ds_config, dist_init_required=False)
    return engine


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainSection, num_steps: int) -> Any:
    """Learning rates by optimizer step: ceil(num_steps * warmup_ratio) of linear warm-up, then
    the shape of `train.lr_schedule` down to the last step."""
    from transformers import get_scheduler

    warmup = math.ceil(num_steps * train.warmup_ratio)
    name = {"constant": "constant_with_warmup"}.get(train.lr_schedule, train.lr_schedule)
    return get_scheduler(name, optimizer, warmup, num_steps)


def backward(engine: Any, loss: torch.Tensor, *, last: bool, world_size: int) -> None:
    """Adds the gradient of `loss`, this rank's share of a sum over all ranks.

    DeepSpeed averages over ranks and would divide by its own accumulation count: both are undone,
    so that the optimizer sees the gradient of the plain sum.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * world_size, scale_wrt_gas=False)


def update(engine: Any) -> tuple[float, float]:
    """One optimizer step; (gradient norm before clipping, learning rate it used)."""
    learning_rate = engine.optimizer.param_groups[0]["lr"]
    norm = _plain_norm(engine)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return (math.nan if norm is None else float(norm)), float(learning_rate)


def _plain_norm(engine: Any) -> float | None:
    """The gradient norm under ZeRO-0 in float32, which DeepSpeed clips by and does not keep."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = (parameter.grad for parameter in engine.module.parameters())
    return float(torch.nn.utils.get_total_norm(g for g in gradients if g is not None))


def take_down(engine: Any) -> None:
    """Frees an engine and its hooks before the process group goes.

    Without this order a worker sometimes aborts at exit, after all its work.
    """
    engine.destroy()
    gc.collect()
