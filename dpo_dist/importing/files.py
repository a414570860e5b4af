"""The file that a user has: its YAML with the words behind it, checked key by key."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from dpo_dist.errors import ConfigError
from dpo_dist.importing.settings import Peer, Settings
from dpo_dist.parsing import parse_yaml


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a file holds; raises ConfigError, with `what` it should be."""
    try:
        values: Any = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        remedy = "Correct the path or the file."
        raise ConfigError(f"{path}: {reason}", f"{what}, readable", remedy) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}", f"{what}, a mapping", "Correct the file."
        )
    return cast("dict[str, Any]", values)


def repeated_keys(path: Path) -> list[str]:
    """Keys that stand twice in a file; YAML takes the last and says nothing."""
    node: Any = yaml.compose(path.read_text(encoding="utf-8-sig"))
    names = [str(key.value) for key, _ in node.value]
    return sorted({name for name in names if names.count(name) > 1})


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping with `key=value` words put over it; raises ConfigError for other words."""
    values = dict(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"{override!r}", "KEY=VALUE with a key of the file's trainer",
                "For example learning_rate=1e-6.",
            )  # fmt: skip
        try:
            values[key] = parse_yaml(text) if text else None
        except ValueError as error:
            raise ConfigError(
                f"{override!r} is not YAML ({error})", "KEY=VALUE with a YAML value",
                "Quote text that is not YAML.",
            ) from None  # fmt: skip
    return values


def settings_of(peer: Peer, values: dict[str, Any], path: Path) -> Settings:
    """The settings under today's names; all unknown keys are refused at once."""
    values = {peer.renamed.get(key, key): value for key, value in values.items()}
    known = peer.known
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        listed = "".join(f"\n  {key}: unknown key; {_hint(key, known)}" for key in unknown)
        raise ConfigError(
            f"{path} has {len(unknown)} unknown key{'s' * (len(unknown) > 1)}:{listed}",
            f"keys of {peer.documented}",
            "Correct the lines above, or remove what is your script's own.",
        )
    return Settings(peer, values, path)


def _hint(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "nothing of that name is near"
