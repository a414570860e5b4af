"""A YAML of TRL's `dpo` script -> a run.yaml, with a reason behind every value.

1. `read_settings` reads the YAML and `key=value` words behind it, and refuses unknown keys.
2. `convert` goes through the sections; what TRL's YAML leaves out has TRL's default, not ours.
3. `as_yaml` writes the values with their reasons, then what was not taken and what to do instead.

Neither TRL nor torch is needed; keys.py holds what becomes of each key.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.keys import explain_keys
from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError
from dpo_dist.trl_import import keys
from dpo_dist.trl_import.convert import convert_data, convert_model
from dpo_dist.trl_import.convert_output import convert_output
from dpo_dist.trl_import.convert_train import convert_train
from dpo_dist.trl_import.settings import Run, Settings


@dataclass(frozen=True)
class Imported:
    """A run.yaml as text, the arithmetic of its batch, and what would make the numbers differ."""

    text: str
    arithmetic: str
    differs: list[str] = field(default_factory=list)


def import_trl(
    path: Path, overrides: Sequence[str], num_processes: int | None, accelerate: Path | None
) -> Imported:
    """Converts a YAML of TRL; raises ConfigError when it has unknown or unusable keys."""
    settings = read_settings(path, overrides)
    launcher = _read_yaml(accelerate, "an accelerate config") if accelerate else {}
    run = Run(settings, num_processes or launcher.get("num_processes"), launcher)
    convert_model(run)
    convert_data(run)
    convert_train(run)
    convert_output(run)
    _list_the_rest(run)
    text = as_yaml(run, path)
    parse_config(yaml.safe_load(text), f"what became of {path}")
    return Imported(text, run.arithmetic, run.differs)


def read_settings(path: Path, overrides: Sequence[str]) -> Settings:
    """The keys of a YAML, today's names for renamed ones; all unknown ones are refused at once."""
    values = _read_yaml(path, "a YAML for TRL's dpo script")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"{override!r}", "KEY=VALUE with a key of TRL", "For example learning_rate=1e-6."
            )
        values[key] = yaml.safe_load(text) if text else None
    values = {keys.RENAMED.get(key, key): value for key, value in values.items()}
    settings = Settings(values)
    unknown = [key for key in values if key not in keys.KNOWN]
    if unknown:
        listed = "".join(f"\n  {key}: unknown key; {_hint(key)}" for key in unknown)
        raise ConfigError(
            f"{path} has {len(unknown)} unknown key{'s' * (len(unknown) > 1)}:{listed}",
            "keys of TRL 1.16's DPOConfig, ModelConfig, ScriptArguments or DatasetMixtureConfig",
            "Correct the lines above, or remove what is your script's own.",
        )
    return settings


def _hint(key: str) -> str:
    close = difflib.get_close_matches(key, keys.KNOWN, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "nothing of that name is near"


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        remedy = "Correct the path or the file."
        raise ConfigError(f"{path}: {reason}", f"{what}, readable", remedy) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}", f"{what}, a mapping", "Correct the file."
        )
    return values


def _list_the_rest(run: Run) -> None:
    """What the YAML sets and no section has taken, each with what to do instead."""
    for key, value in run.settings.values.items():
        if key in keys.DIFFERS:
            default, remedy = keys.DIFFERS[key]
            if value == default:
                run.not_needed.append(f"{key}: TRL's default, and what happens here")
            else:
                run.differs.append(f"{key}: {value}; {remedy}")
        elif key in keys.NOT_NEEDED:
            run.not_needed.append(f"{key}: {keys.NOT_NEEDED[key]}")
        elif key in keys.FORMER:
            run.differs.append(f"{key}: {value}; {keys.FORMER[key]}")
        elif key not in run.settings.read:
            run.not_needed.append(f"{key}: without effect beside the other keys")


def as_yaml(run: Run, path: Path) -> str:
    """The run.yaml: sections in the order of `dpo-dist config`, a reason behind every value."""
    lines = [f"# Made of {path.name} by `dpo-dist import-trl`."]
    order = [key for key, *_ in explain_keys()]
    section = ""
    for key in sorted(run.values, key=order.index):
        value, why = run.values[key]
        head, name = key.split(".", 1)
        if head != section:
            section = head
            lines.append(f"{section}:")
        lines.extend(_entry(name, value, why))
    for title, notes in (
        ("Not taken, and what to do instead:", run.differs),
        ("Not needed here:", run.not_needed),
    ):
        if notes:
            lines += ["", f"# {title}", *(f"#   {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, why: str) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        items = [f"    - {_in_line(item)}" for item in value]
        return [f"  {name}:  # {why}", *items]
    return [f"  {name}: {_in_line(value)}  # {why}"]


def _in_line(value: Any) -> str:
    dumped = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return dumped.removesuffix("\n...\n").strip()
