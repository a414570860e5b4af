"""One row of a source, and its fields read with errors that say where they are."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from dpo_dist.errors import DataError


class RowError(DataError):
    """A single row is not usable; others of its source may be."""


@dataclass(frozen=True)
class Row:
    """Named values and where they lie, `file:line`."""

    fields: Mapping[str, Any]
    origin: str
    lacks_partner: bool = False  # a labelled answer without one of the other label
    fault: RowError | None = None  # what kept it from being read; there are no fields then

    def sound(self) -> "Row":
        """The row itself; raises its fault if it has one."""
        if self.fault is not None:
            raise self.fault
        return self

    def field(self, name: str) -> Any:
        """A field that is there and not null; raises DataError otherwise."""
        if name not in self.fields:
            raise RowError(
                f"{self.origin} has no field {name!r} (it has {', '.join(self.fields) or 'none'})",
                f"a field {name!r} in every row",
                "Correct or remove the row, or map the column with `columns`.",
            )
        value = self.fields[name]
        if value is None:
            raise self.unusable(f"field {name!r} is null", "text or messages")
        return value

    def text(self, name: str) -> str:
        """A field that is text; raises DataError otherwise."""
        return self.checked_text(f"field {name!r}", self.field(name))

    def checked_text(self, name: str, value: Any) -> str:
        """`value` if it is text that can be encoded; raises DataError under `name` otherwise."""
        if not isinstance(value, str):
            raise self.unusable(f"{name} is {type_name(value)}", "a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a UTF-16 pair
            half = f"\\u{ord(value[error.start]):04x}"
            raise self.unusable(f"{name} holds half a character ({half})", "whole ones") from None
        return value

    def checked_number(self, name: str, value: Any) -> float:
        """`value` if it is a finite number, be it as text (CSV); raises DataError otherwise."""
        number = math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
        if not math.isfinite(number):
            found = repr(value) if isinstance(value, str | float) else type_name(value)
            raise self.unusable(f"{name} is {found}", "a number")
        return number

    def unusable(self, found: str, expected: str) -> RowError:
        """The error of a row that has to be fixed."""
        return RowError(f"{self.origin}: {found}", expected, "Correct or remove the row.")


def without_padding(value: Any) -> Any:
    """A value without the nulls of nested keys: a typed table gives every object the keys of all,
    and a template would write them out."""
    if (named := as_object(value)) is not None:
        return {key: without_padding(item) for key, item in named.items() if item is not None}
    items = as_list(value)
    return value if items is None else [without_padding(item) for item in items]


def as_object(value: Any) -> dict[str, Any] | None:
    """The value if it is a JSON object."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def as_list(value: Any) -> list[Any] | None:
    """The value if it is a JSON array."""
    return cast("list[Any]", value) if isinstance(value, list) else None


def type_name(value: Any) -> str:
    """A reader's name of a JSON type: `a number`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    names = {"dict": "an object", "list": "a list", "str": "a string"}
    kind = type(value).__name__
    return names.get(kind, f"a {kind}")
