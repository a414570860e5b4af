"""What all sections of a run config share; frozen, strict, torch-free."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())
