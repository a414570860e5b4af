"""What is read and written: a trainer's keys, the settings of a file, the run that they become."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.keys import explain_keys
from dpo_dist.errors import ConfigError

OUR_DEFAULTS = {key: yaml.safe_load(default) for key, _, default, _ in explain_keys()}
Default = Any
Keys = dict[str, tuple[str, Default]]
Left = dict[str, tuple[Default, str]]  # key -> (its default, what to do instead)


@dataclass(frozen=True)
class Peer:
    """Another trainer: every key that its config may hold, and what becomes of it here.

    `shared` names its keys where two trainers mean the same: those of transformers' own
    TrainingArguments, under which the conversions that all share ask for them.
    """

    name: str
    documented: str  # where its keys are
    same: Keys  # key -> (ours, its default); the value is copied
    same_of_adapter: Keys  # the same for an adapter; without one they do nothing
    converted: Keys  # key -> (our keys, its default); there is more to it
    differs: Left  # not taken, and the numbers would differ unless it has its default
    not_needed: dict[str, str]  # key -> why not; no number depends on it
    renamed: dict[str, str]  # a key of earlier versions -> today's
    former: dict[str, str]  # a key of earlier versions, or of plugins -> what to do
    shared: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def defaults(self) -> dict[str, Default]:
        tables = (self.same, self.same_of_adapter, self.converted)
        return {key: default for table in tables for key, (_, default) in table.items()}

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.defaults, *self.differs, *self.not_needed, *self.renamed, *self.former)


def reasons(reasons_of_keys: dict[str, str]) -> dict[str, str]:
    """{why: "key key"} -> {key: why}."""
    return {key: why for why, keys in reasons_of_keys.items() for key in keys.split()}


@dataclass
class Settings:
    """The settings of a file; a key that it leaves out has its trainer's default."""

    peer: Peer
    values: dict[str, Any]
    path: Path  # of the file
    read: set[str] = field(default_factory=set[str])

    def name(self, key: str) -> str:
        """The trainer's name of a key that is asked for under transformers' name."""
        return self.peer.shared.get(key, key)

    def get(self, key: str) -> Any:
        """The value of a key, of the type of its default; None where the trainer has no such."""
        name = self.name(key)
        self.read.add(name)
        default = self.peer.defaults.get(name)
        value = self.values.get(name, default)
        return default if value is None else _typed(name, value, default)

    def given(self, key: str) -> bool:
        """Whether the file sets a key."""
        return self.values.get(self.name(key)) is not None

    def why(self, key: str, note: str = "") -> str:
        """The reason behind a value: where it comes from."""
        name = self.name(key)
        source = name if self.given(key) else f"{self.peer.name}'s default of {name}"
        return f"{source}; {note}" if note else source


def _typed(key: str, value: Any, default: Any) -> Any:
    """YAML reads 5e-7 as text; other parsers make a number of it."""
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise wrong(key, value, "true or false")
    if isinstance(default, int | float):
        return as_number(key, value, whole=not isinstance(default, float))
    return value


def as_number(key: str, value: Any, *, whole: bool = False) -> int | float:
    """A number however it is written, an int if `whole` and it has no fraction."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise wrong(key, value, "a number") from None
    return int(number) if whole and number.is_integer() else number


def number_of(settings: Settings, key: str) -> float | None:
    """The value of a key whose default is none, as a number."""
    value = settings.get(key)
    return None if value is None else as_number(settings.name(key), value)


def wrong(key: str, value: Any, expected: str) -> ConfigError:
    """The error of a value that is not usable."""
    return ConfigError(f"{key}: {value!r}", expected, "Correct the YAML.")


@dataclass
class Run:
    """The run config as it grows: our key -> (value, why), and what was not taken."""

    settings: Settings
    num_processes: int | None
    accelerate: dict[str, Any]
    values: dict[str, tuple[Any, str]] = field(default_factory=dict[str, tuple[Any, str]])
    differs: list[str] = field(default_factory=list[str])
    not_needed: list[str] = field(default_factory=list[str])
    arithmetic: str = ""

    def put(self, key: str, value: Any, why: str) -> None:
        """Sets one of our keys, with the reason that is written behind it."""
        assert key in OUR_DEFAULTS, key
        self.values[key] = (value, why)

    def value(self, key: str) -> Any:
        """The value that one of our keys has so far, set or by default."""
        return self.values.get(key, (OUR_DEFAULTS[key],))[0]

    def copy(self, table: Keys) -> None:
        """Copies the keys of a table that are set, or whose default is another one than ours."""
        for key, (ours, default) in table.items():
            value = self.settings.get(key)
            differs = default is not None and default != OUR_DEFAULTS[ours]
            if self.settings.given(key) or differs:
                self.put(ours, value, self.settings.why(key))


def names_in(value: Any) -> list[str]:
    """A list as trainers write it: itself, one name, or names between commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return [str(name) for name in value] if isinstance(value, Iterable) else [str(value)]


def target_modules(value: Any) -> list[str] | str:
    """adapter.target_modules from names, all-linear, or a pattern, which may be alone in a list."""
    names = [value] if isinstance(value, str) else [str(name) for name in value]
    is_name = re.fullmatch(r"[\w.]+", names[0]) if len(names) == 1 else True
    return names if is_name else names[0]
