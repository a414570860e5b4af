"""DeepSpeed engines: the only place that starts one, steps it and takes it down."""

import gc
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding.optimizers import make_optimizer
from dpo_dist.engine.sharding.schedule import make_schedule

SUM_NAME = "gradient_sum"  # of a parameter: its gradients so far, in float32


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


def backward(engine: Any, loss: torch.Tensor, *, last: bool, world_size: int) -> None:
    """Adds the gradient of `loss`, this rank's share of a sum over all ranks.

    DeepSpeed averages over ranks and would divide by its own accumulation count: both are undone,
    so that the optimizer sees the gradient of the plain sum.

    Micro-batches are added up in float32 whatever the dtype: in bfloat16, 64 of them would lose
    percents. ZeRO-2 and 3 do it as `data_types` of their config says; below, DeepSpeed cannot.
    """
    engine.set_gradient_accumulation_boundary(last)
    sums_here = engine.bfloat16_enabled() and engine.zero_optimization_stage() < 2
    if sums_here and last:
        _put_sums_back(engine)
    engine.backward(loss * world_size, scale_wrt_gas=False)
    if sums_here and not last:
        _take_gradients_out(engine)


def _take_gradients_out(engine: Any) -> None:
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            before = getattr(parameter, SUM_NAME, None)
            gradient = parameter.grad.float()
            setattr(parameter, SUM_NAME, gradient if before is None else before.add_(gradient))
            parameter.grad = None


def _put_sums_back(engine: Any) -> None:
    """To where the last backward adds its own gradient and DeepSpeed reduces: rounded once."""
    for parameter in engine.module.parameters():
        if hasattr(parameter, SUM_NAME):
            parameter.grad = getattr(parameter, SUM_NAME).to(parameter.dtype)
            delattr(parameter, SUM_NAME)


class Update(NamedTuple):
    """What became of an optimizer step."""

    grad_norm: float  # before clipping, over all ranks
    learning_rate: float  # of this step
    applied: bool  # False on every rank alike: a gradient was not finite


def update(engine: Any) -> Update:
    """One optimizer step, unless a gradient is not finite on some rank.

    Then weights and optimizer state stay as they were, on every rank, and the schedule goes on as
    if the step had been done.
    """
    learning_rate = float(engine.optimizer.param_groups[0]["lr"])
    norm = _plain_norm(engine)
    if norm is not None and not math.isfinite(norm):
        engine.zero_grad()  # this optimizer is torch's own, which would take any gradient
        engine.global_steps += 1
        applied = False
    else:
        engine.step()
        applied = engine.was_step_applied()
    if not applied:  # DeepSpeed holds the schedule back, and torch warns of one without updates
        with warnings.catch_warnings(action="ignore"):
            engine.lr_scheduler.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return Update(math.nan if norm is None else float(norm), learning_rate, applied)


def _plain_norm(engine: Any) -> float | None:
    """The gradient norm under ZeRO-0 in float32, which DeepSpeed clips by and does not keep."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = (parameter.grad for parameter in engine.module.parameters())
    return float(torch.nn.utils.get_total_norm(g for g in gradients if g is not None))


class GradientWatch:
    """Whether this rank's own gradients are finite, before they are added up over ranks.

    Looks at the first parameter that trains, which backward reaches last: what is not finite
    spreads on the way to it. Nobody waits for the device before `is_finite` is asked.
    """

    def __init__(self, engine: Any) -> None:
        first = next(p for p in engine.module.parameters() if p.requires_grad)
        self._finite = torch.ones((), dtype=torch.bool, device=engine.device)
        first.register_hook(self._look)

    def reset(self) -> None:
        """Before the micro-batches of a step."""
        self._finite.fill_(True)

    @property
    def is_finite(self) -> bool:
        return bool(self._finite)

    def _look(self, gradient: torch.Tensor) -> None:
        # extremes, since NaN is one too and a mask would be as large as the embedding
        for extreme in gradient.detach().aminmax():
            self._finite &= extreme.isfinite()


def weights_are_finite(engine: Any) -> bool:
    """Whether what trains is finite, as far as this rank holds it."""
    held = [_held(p) for p in engine.module.parameters() if p.requires_grad]
    extremes = [extreme.float() for part in held if part.numel() for extreme in part.aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def _held(parameter: Any) -> torch.Tensor:
    """This rank's part; behind its end a ZeRO-3 partition has memory that nobody has set."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach().flatten()
    start = collectives.place()[0] * part.numel()
    return part[: max(0, parameter.ds_numel - start)]


def take_down(engine: Any) -> None:
    """Frees an engine and its hooks before the process group goes.

    Without this order a worker sometimes aborts at exit, after all its work.
    """
    engine.destroy()
    gc.collect()
