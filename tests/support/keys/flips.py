"""A config key flipped: two runs that differ in this one key, and what its code makes of each.

FLIPS = [Flip("data.on_empty", "keep", pairs_of), ...]

@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key(flip, run_yaml, tmp_path):
    assert_effect(flip, run_yaml, tmp_path)
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig, load_config

Effect = Callable[[RunConfig], Any]


@dataclass(frozen=True)
class Flip:
    """A key as `dpo-dist config` names it, another value, and the function that shows its effect.

    The effect is whatever can be compared; an error's text counts. `given` are keys that both runs
    have because the key does nothing without them.
    """

    key: str
    value: Any
    effect: Effect
    given: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.key


def assert_effect(flip: Flip, run_yaml: Path) -> None:
    """Fails unless the effect differs between two runs that differ in the flipped key alone."""
    given = overrides(flip.given)
    plain = _config_of(run_yaml, given)
    flipped = _config_of(run_yaml, [*given, *overrides({flip.key: flip.value})])
    different = {key for key, _ in _values(plain) ^ _values(flipped)}
    own = {key for key in different if f"{key}.".startswith(f"{_place(flip.key)}.")}
    assert own and different - own <= {"run.dir"}, f"{flip.value} flips {different}"
    unflipped = _without_flip(flip.effect, run_yaml, tuple(given))
    assert flip.effect(flipped) != unflipped, f"{flip.key}={flip.value} changes nothing"


@functools.cache
def _without_flip(effect: Effect, run_yaml: Path, given: tuple[str, ...]) -> Any:
    """The effect of a run, the same in two of them: what differs there differs by itself."""
    one, other = (effect(_config_of(run_yaml, given)) for _ in range(2))
    assert one == other, "it differs by itself"
    return one


def _config_of(run_yaml: Path, overrides: Sequence[str]) -> RunConfig:
    """The run in a folder of its own."""
    folder = tempfile.mkdtemp(dir=run_yaml.parent)
    return load_config(run_yaml, [f"run.dir={folder}/out", *overrides])


def overrides(values: Mapping[str, Any]) -> list[str]:
    """`section.key=value` as on the command line."""
    return [f"{_place(key)}={json.dumps(value)}" for key, value in values.items()]


def _place(key: str) -> str:
    """Where a key is set: in the first entry of a list, and in the stage `train`."""
    return key.replace("[]", ".0").replace(".NAME", ".train")


def _values(config: RunConfig) -> set[tuple[str, str]]:
    """Every key with its value as text."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict | list) and value:
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for name, inner in entries:
                yield from walk(inner, f"{key}.{name}" if key else str(name))
        else:
            yield key, json.dumps(value)

    return set(walk(config.model_dump(mode="json"), ""))
