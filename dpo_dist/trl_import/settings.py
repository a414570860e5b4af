"""What `import-trl` reads from and writes to: TRL's settings, and the run that becomes of them."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from dpo_dist.config.keys import explain_keys
from dpo_dist.errors import ConfigError
from dpo_dist.trl_import import keys

OUR_DEFAULTS = {key: yaml.safe_load(default) for key, _, default, _ in explain_keys()}


@dataclass
class Settings:
    """A YAML for TRL; a key that it leaves out has TRL's default."""

    values: dict[str, Any]
    read: set[str] = field(default_factory=set)

    def get(self, key: str) -> Any:
        """The value of a key, of the type of TRL's default."""
        self.read.add(key)
        default = keys.DEFAULTS[key]
        value = self.values.get(key, default)
        return default if value is None else _typed(key, value, default)

    def given(self, key: str) -> bool:
        """Whether the YAML sets a key."""
        return self.values.get(key) is not None

    def why(self, key: str, note: str = "") -> str:
        """The reason behind a value: where it comes from."""
        source = key if self.given(key) else f"TRL's default of {key}"
        return f"{source}; {note}" if note else source


def _typed(key: str, value: Any, default: Any) -> Any:
    """YAML reads 5e-7 as text; TRL's parser makes a number of it."""
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise _wrong(key, value, "true or false")
    if isinstance(default, int | float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise _wrong(key, value, "a number") from None
        return int(number) if number.is_integer() and not isinstance(default, float) else number
    return value


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{key}: {value!r}", expected, "Correct the YAML.")


@dataclass
class Run:
    """The run config as it grows: our key -> (value, why), and what was not taken."""

    settings: Settings
    num_processes: int | None
    accelerate: dict[str, Any]
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    not_needed: list[str] = field(default_factory=list)
    arithmetic: str = ""

    def put(self, key: str, value: Any, why: str) -> None:
        """Sets one of our keys, with the reason that is written behind it."""
        assert key in OUR_DEFAULTS, key
        self.values[key] = (value, why)

    def copy(self, table: dict[str, tuple[str, Any]]) -> None:
        """Copies the keys of a table that are set, or whose default is another one than ours."""
        for key, (ours, default) in table.items():
            value = self.settings.get(key)
            differs = default is not None and default != OUR_DEFAULTS[ours]
            if self.settings.given(key) or differs:
                self.put(ours, value, self.settings.why(key))
