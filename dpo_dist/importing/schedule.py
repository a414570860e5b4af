"""The learning rate: its schedule, the warm-up and the end, under transformers' names."""

import math
from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.importing.settings import Run, as_number, number_of, wrong
from dpo_dist.parsing import parse_yaml

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
SHAPES = ("cosine", "linear", "1-sqrt")
# settings of warmup_stable_decay that are no difference with this value, transformers' default
AS_HERE = {"warmup_type": "linear", "num_cycles": 0.5}


def convert_schedule(run: Run, rest_decays: float | None) -> None:
    """train.lr_schedule and the keys that it reads.

    `rest_decays`: the share of the steps after the warm-up in which warmup_stable_decay decays
    where the file does not say; None where it has to.
    """
    settings = run.settings
    key, schedule = settings.name("lr_scheduler_type"), settings.get("lr_scheduler_type")
    if schedule not in SCHEDULES:
        run.differs.append(
            f"{key}: {schedule}; train.lr_schedule is linear, one of "
            f"{', '.join(dict.fromkeys(SCHEDULES.values()))}"
        )
    shape = SCHEDULES.get(schedule, "linear")
    run.put("train.lr_schedule", shape, settings.why("lr_scheduler_type"))
    _warmup(run, schedule)
    kwargs = _kwargs(run)
    if schedule in WITH_MIN_LR:
        _min_lr(run, schedule, kwargs)
    elif shape == "wsd":
        _decay(run, kwargs, rest_decays)
    for name, value in kwargs.items():
        kwarg = f"{settings.name('lr_scheduler_kwargs')}.{name}"
        run.differs.append(f"{kwarg}: {value}; train.lr_schedule has no such setting")


def _warmup(run: Run, schedule: str) -> None:
    """A count of steps comes before a share, as it does in transformers."""
    settings, ratio = run.settings, "train.warmup_ratio"
    steps = number_of(settings, "warmup_steps") or 0.0
    if schedule == "constant":
        why = f"{settings.name('lr_scheduler_type')} constant does not warm up"
        run.put(ratio, 0.0, why)
    elif steps >= 1:
        run.put("train.warmup_steps", int(steps), settings.why("warmup_steps"))
    elif settings.given("warmup_ratio"):
        run.put(ratio, float(settings.get("warmup_ratio")), "warmup_ratio")
    else:
        run.put(ratio, steps, settings.why("warmup_steps"))


def _kwargs(run: Run) -> dict[str, Any]:
    """lr_scheduler_kwargs, a mapping or, as on TRL's command line, its JSON."""
    key = run.settings.name("lr_scheduler_kwargs")
    given = run.settings.get("lr_scheduler_kwargs")
    if isinstance(given, str):
        try:
            given = parse_yaml(given)
        except ValueError:
            raise wrong(key, given, "a mapping, such as {min_lr_rate: 0.1}") from None
    if given is not None and not isinstance(given, dict):
        raise wrong(key, given, "a mapping, such as {min_lr_rate: 0.1}")
    return dict(cast("dict[str, Any]", given or {}))


def _min_lr(run: Run, schedule: str, kwargs: dict[str, Any]) -> None:
    """Where the cosine ends: a share of the peak, or a rate to divide by it."""
    settings, key = run.settings, run.settings.name("lr_scheduler_kwargs")
    rate, lowest = kwargs.pop("min_lr_rate", None), kwargs.pop("min_lr", None)
    if rate is None and lowest is None:
        raise ConfigError(
            f"{settings.name('lr_scheduler_type')}: {schedule} without a rate to end at",
            "min_lr_rate or min_lr in lr_scheduler_kwargs",
            "Put lr_scheduler_kwargs={min_lr_rate: 0.1} behind the file.",
        )
    if rate is not None:
        share = as_number(f"{key}.min_lr_rate", rate)
        run.put("train.min_lr_rate", float(share), f"{key}.min_lr_rate")
    else:
        peak = float(run.value("train.learning_rate"))
        why = f"{key}.min_lr {lowest} / learning_rate {peak}"
        run.put("train.min_lr_rate", float(as_number(f"{key}.min_lr", lowest)) / peak, why)
    if schedule == WITH_MIN_LR[1]:
        run.differs.append(
            f"{settings.name('lr_scheduler_type')}: {schedule}; train.lr_schedule cosine is the "
            "same curve a step later, which begins at 0"
        )


def _decay(run: Run, kwargs: dict[str, Any], rest_decays: float | None) -> None:
    """The last phase of warmup_stable_decay: its steps, its shape, where it ends."""
    settings, key = run.settings, run.settings.name("lr_scheduler_kwargs")
    steps, stable = kwargs.pop("num_decay_steps", None), kwargs.pop("num_stable_steps", None)
    if steps is not None:
        name = f"{key}.num_decay_steps"
        run.put("train.decay_steps", as_number(name, steps, whole=True), name)
    elif rest_decays is not None:
        _decay_of_the_rest(run, rest_decays)
    else:
        raise ConfigError(
            f"{settings.name('lr_scheduler_type')}: warmup_stable_decay without steps to decay in",
            "num_decay_steps in lr_scheduler_kwargs",
            "Put lr_scheduler_kwargs={num_decay_steps: 100} behind the file.",
        )
    if stable is not None:
        run.differs.append(
            f"{key}.num_stable_steps: {stable}; wsd is stable until train.decay_steps are left, "
            "which is the same where warmup, stable and decay add up to all steps"
        )
    if kwargs.get("decay_type") in SHAPES:
        run.put("train.decay_shape", kwargs.pop("decay_type"), f"{key}.decay_type")
    if "min_lr_ratio" in kwargs:
        name = f"{key}.min_lr_ratio"
        run.put("train.min_lr_rate", float(as_number(name, kwargs.pop("min_lr_ratio"))), name)
    for name, value in AS_HERE.items():
        if kwargs.get(name) == value:
            del kwargs[name]


def _decay_of_the_rest(run: Run, share: float) -> None:
    """train.decay_steps as `share` of what follows the warm-up: exact where the steps are known."""
    ratio, steps = run.value("train.warmup_ratio"), run.value("train.warmup_steps")
    limit, why = run.settings.get("max_steps") or 0, f"{run.settings.peer.name}'s default"
    if limit > 0:
        rest = limit - (math.ceil(limit * ratio) if steps is None else steps)
        decay = rest - int(rest * (1 - share) + 1e-9)  # it is the stable steps that it rounds down
        run.put("train.decay_steps", decay, f"{why}: {share:.2f} of the steps after the warm-up")
    elif steps is None:
        why = f"{why}: {share:.2f} of the steps after the warm-up, to a step"
        run.put("train.decay_steps", share * (1 - ratio), why)
    else:
        run.differs.append(
            f"{run.settings.name('lr_scheduler_type')}: warmup_stable_decay without "
            f"num_decay_steps; set train.decay_steps to {share:.2f} of the steps that follow the "
            "warm-up, once `dpo-dist plan` shows how many there are"
        )
