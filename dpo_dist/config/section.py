"""What all sections of a run config share: frozen, strict, torch-free."""

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rule = tuple[bool, str, str, str]  # (is it broken, found, expected, remedy)


class Section(BaseModel):
    """A frozen group of keys that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


def broken(rules: Iterable[Rule]) -> Iterator[str]:
    """One line for every broken rule between keys that are valid one by one."""
    for is_broken, found, expected, remedy in rules:
        if is_broken:
            yield f"{found}; expected {expected}. {remedy}"
