"""The learning rate by optimizer step: transformers' schedules, under our names.

Imports neither torch nor transformers before a schedule is made, so that the planner can ask
whether one fits its run.
"""

from typing import TYPE_CHECKING, Any

from dpo_dist.config.section import steps_of
from dpo_dist.config.training_section import TrainSection
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch


def make_schedule(optimizer: "torch.optim.Optimizer", train: TrainSection, num_steps: int) -> Any:
    """A linear warm-up, then the shape of `train.lr_schedule` down to the last step.

    With r = min_lr_rate, cosine is peak * (r + (1 - r) * (1 + cos(pi * p)) / 2), where p goes from
    0 after the warm-up to 1 behind the last step. wsd stays at the peak after the warm-up until
    decay_steps are left; there it is peak * (r + (1 - r) * f(p)), where p goes from 0 to 1 as
    above and f is (1 + cos(pi * p)) / 2, 1 - p or 1 - sqrt(p). Its warm-up begins at peak * r, as
    transformers' does; every other one begins at 0.
    """
    from transformers import get_scheduler

    warmup, decay = warmup_and_decay(train, num_steps)
    name, settings = train.lr_schedule, {}
    if name == "wsd":
        name = "warmup_stable_decay"
        settings = {
            "num_decay_steps": decay, "decay_type": train.decay_shape,
            "min_lr_ratio": train.min_lr_rate,
        }  # fmt: skip
    elif name == "constant":
        name = "constant_with_warmup"
    elif train.min_lr_rate > 0:
        name, settings = "cosine_with_min_lr", {"min_lr_rate": train.min_lr_rate}
    return get_scheduler(name, optimizer, warmup, num_steps, scheduler_specific_kwargs=settings)


def warmup_and_decay(train: TrainSection, num_steps: int) -> tuple[int, int]:
    """Steps of the warm-up and, where the schedule has one, of a decay of its own.

    Raises ConfigError when the two of wsd take more steps than there are: transformers would begin
    in the middle of the decay.
    """
    share = train.warmup_ratio
    warmup = train.warmup_steps or 0 if share is None else steps_of(float(share), num_steps)
    if train.lr_schedule != "wsd":
        return warmup, 0
    decay = steps_of(train.decay_steps, num_steps)
    if warmup + decay > num_steps:
        raise ConfigError(
            f"train.lr_schedule: wsd with {warmup} steps of warmup and {decay} of decay in a run "
            f"of {num_steps}",
            f"at most {num_steps} together",
            "Lower train.decay_steps or the warmup, or train for longer.",
        )
    return warmup, decay
