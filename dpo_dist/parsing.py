"""JSON and YAML that others wrote: a value, or a ValueError that says in one line why not.

The libraries raise a dozen types for text that is none, such as RecursionError for brackets in
brackets and KeyError for `!!bool x`.
"""

import functools
import json
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

MOST_NESTED = 100  # lists and objects within each other, as many as code here may walk by recursion
MOST_ENTRIES = 1_000_000  # of a YAML text with its aliases written out


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError, which may be a JSONDecodeError."""
    opens = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    if sum(map(text.count, opens)) > MOST_NESTED:  # pyright: ignore[reportArgumentType]
        _check_entries(value, None)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ValueError."""
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise _too_deep() from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # beside YAMLError what Python raises for a date that does not exist, `!!int ""` or the like
        raise ValueError(" ".join(str(error).split())) from None
    _check_entries(value, MOST_ENTRIES)
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text; raises ValueError, also for another value."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {str(value)[:40]!r}, not an object")
    return cast("dict[str, Any]", value)


def parse_as(kind: type[T], text: str | bytes) -> T:
    """A JSON text as a dataclass, all keys of which are known, or a model, of which more may be
    there; types are checked. Raises ValueError."""
    from pydantic import ValidationError  # not needed by the forward alone, and half a second

    value = parse_json(text)
    if is_dataclass(kind) and isinstance(value, dict):
        known = [field.name for field in fields(kind)]
        if unknown := [str(key) for key in cast("dict[str, Any]", value) if key not in known]:
            raise ValueError(f"{unknown[0]}: unknown key")
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


@functools.cache
def _adapter(kind: type[T]) -> "TypeAdapter[T]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _check_entries(value: Any, most: int | None) -> None:
    """Raises ValueError at too many levels, which an alias of what it stands in has too, or at too
    many entries."""
    level, total = {id(value): (value, 1)}, 0
    for _ in range(MOST_NESTED + 1):
        below: dict[int, tuple[Any, int]] = {}
        for item, times in level.values():
            children = _children(item)
            total += times * len(children)
            for child in children:
                if isinstance(child, dict | list):
                    _, before = below.get(id(child), (child, 0))  # pyright: ignore
                    below[id(child)] = (child, before + times)
        if most is not None and total > most:
            raise ValueError(f"its aliases stand for more than {most:,} entries")
        if not below:
            return
        level = below
    raise _too_deep()


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list) else []


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MOST_NESTED} levels")
