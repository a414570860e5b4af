"""What all sections of a run config share: frozen, strict, torch-free."""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
