"""`section.key=value` overrides, applied to the mapping that a YAML file holds; and no secrets."""

import os
import re
from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.parsing import parse_yaml

_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[pousr]_\w{36,}|AKIA[0-9A-Z]{16})\b"
    r"|://[^/@\s]+:[^/@\s]+@"  # https://user:password@host
)
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
_MIN_SECRET = 12  # characters; shorter values of such variables are switches, not secrets


def refuse_secrets(value: Any, key: str = "") -> None:
    """Raises ConfigError, without the value, when a text of a config is or holds a secret.

    A config goes into the run folder, into dry runs, batch scripts, argv and messages.
    """
    if isinstance(value, dict):
        for name, entry in cast(dict[Any, Any], value).items():
            refuse_secrets(entry, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, entry in enumerate(cast(list[Any], value)):
            refuse_secrets(entry, f"{key}.{index}")
    elif isinstance(value, str) and (_SECRET.search(value) or _is_of_environment(value)):
        raise ConfigError(
            f"{key} holds what looks like a token or a password",
            "none in a config, which is copied into the run folder, commands and logs",
            "Put it into the environment (HF_TOKEN, OPENAI_API_KEY, WANDB_API_KEY) or use the "
            "tool's own login, and revoke it if others could read it.",
        )


def _is_of_environment(text: str) -> bool:
    return any(
        value in text
        for name, value in os.environ.items()
        if len(value) >= _MIN_SECRET and _SECRET_NAME.search(name.upper())
    )


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one key of `raw` in place; raises ConfigError when the key or the value is unusable."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"override {override!r}",
            "section.key=value",
            "For example, train.learning_rate=1e-6.",
        )
    refuse_secrets(text, name)  # before any message quotes it
    *parents, leaf = name.split(".")
    target: Any = raw
    for depth, part in enumerate(parents):
        target = _child(target, part, ".".join(parents[: depth + 1]), override)
    try:
        value = parse_yaml(text) if text else None
    except ValueError as error:
        raise ConfigError(
            f"override {override!r} is not YAML ({error})",
            "section.key=value with a YAML value",
            "Quote text that is not YAML: \"run.dir='[x'\".",
        ) from None
    if isinstance(target, list):
        entries = cast(list[Any], target)
        entries[_index(entries, leaf, override)] = value
    else:
        target[leaf] = value


def _child(target: Any, part: str, path: str, override: str) -> Any:
    holder = cast(dict[Any, Any], target)  # or a list, which is asked for an index
    key: Any = part
    if isinstance(target, list):
        key = _index(cast(list[Any], target), part, override)
    else:
        holder.setdefault(part, {})
    child: Any = holder[key]
    if child is None:  # `adapter: null` becomes a section once one of its keys is set
        child = holder[key] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"override {override!r} goes inside {path}, which is {child!r}",
            "a section",
            f"Override {path} itself.",
        )
    return cast(Any, child)


def _index(target: list[Any], part: str, override: str) -> int:
    if not target:
        raise ConfigError(
            f"override {override!r} names an entry of an empty list",
            "a list with entries",
            "Override the whole list.",
        )
    names = [str(index) for index in range(len(target))]
    if part not in names:
        raise ConfigError(
            f"override {override!r}: {part!r} is not an index into a list of {len(target)}",
            f"an index from 0 to {len(target) - 1}",
            "For example, data.train.0.limit=100.",
        )
    return names.index(part)
