"""What all sections of a run config share: frozen, strict, torch-free."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _interval(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value < 1:
            return value
        if math.isfinite(value) and value >= 1 and value == int(value):
            return int(value)
    raise ValueError(f"{value!r}; expected a number of steps, or a share of all steps below 1")


# optimizer steps from one to the next; below 1 a share of all steps
Interval = Annotated[int | float, BeforeValidator(_interval)]


def steps_of(interval: int | float, num_steps: int) -> int:
    """An interval in steps; a share of all steps is rounded up."""
    return math.ceil(num_steps * interval) if isinstance(interval, float) else interval


def _nameable(value: Any) -> Any:
    """A path that a file system can have, or a hub id."""
    text = str(value)
    home, *_ = parts = Path(text).parts or ("",)
    if "\0" in text:
        raise ValueError(f"{text!r} holds a zero byte; expected a path")
    if len(os.fsencode(text)) > MOST_BYTES or any(len(os.fsencode(p)) > 255 for p in parts):
        raise ValueError(f"{text[:40]!r}... is longer than a path can be")
    if home.startswith("~") and os.path.expanduser(home) == home:
        raise ValueError(f"{text!r} is in the home of {home[1:]!r}, who is not a user here")
    return value


MOST_BYTES = 4095  # of a path on Linux
PathText = Annotated[str, AfterValidator(_nameable)]
FilePath = Annotated[Path, AfterValidator(_nameable)]
Rule = tuple[bool, str, str, str]  # (is it broken, found, expected, remedy)


class Section(BaseModel):
    """A frozen group of keys that refuses names it does not know, and NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, protected_namespaces=(), allow_inf_nan=False
    )


def broken(rules: Iterable[Rule]) -> Iterator[str]:
    """One line for every broken rule between keys that are valid one by one."""
    for is_broken, found, expected, remedy in rules:
        if is_broken:
            yield f"{found}; expected {expected}. {remedy}"
