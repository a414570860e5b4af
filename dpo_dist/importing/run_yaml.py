"""The run.yaml that a run becomes: its values, a reason behind each, and what was not taken."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.keys import explain_keys
from dpo_dist.config.run_config import parse_config
from dpo_dist.importing.settings import Run


@dataclass(frozen=True)
class Imported:
    """A run.yaml as text, the arithmetic of its batch, and what would make the numbers differ."""

    text: str
    arithmetic: str
    differs: list[str] = field(default_factory=list[str])


def imported(run: Run, path: Path) -> Imported:
    """What became of the file at `path`; raises ConfigError unless it is a run config."""
    _list_the_rest(run)
    text = _as_yaml(run, path)
    parse_config(yaml.safe_load(text), f"what became of {path}")
    return Imported(text, run.arithmetic, run.differs)


def _list_the_rest(run: Run) -> None:
    """What the file sets and no section has taken, each with what to do instead."""
    peer = run.settings.peer
    for key, value in run.settings.values.items():
        if value is None and key not in run.settings.read:
            continue  # a key without a value, as templates of configs have them
        if key in peer.differs:
            default, remedy = peer.differs[key]
            if value == default or (default is None and value is False):
                run.not_needed.append(f"{key}: {peer.name}'s default, and what happens here")
            else:
                run.differs.append(f"{key}: {value}; {remedy}")
        elif key in peer.not_needed:
            run.not_needed.append(f"{key}: {peer.not_needed[key]}")
        elif key in peer.former:
            run.differs.append(f"{key}: {value}; {peer.former[key]}")
        elif key not in run.settings.read:
            run.not_needed.append(f"{key}: without effect beside the other keys")


def _as_yaml(run: Run, path: Path) -> str:
    """Sections in the order of `dpo-dist config`, a reason behind every value."""
    lines = [f"# Made of {path.name}, of {run.settings.peer.name}, by `dpo-dist import`."]
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
            lines += ["", f"# {title}", *(f"#   {_one_line(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _one_line(note: str) -> str:
    return " ".join(note.split())


def _entry(name: str, value: Any, why: str) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        items = [f"    - {_in_line(item)}" for item in value]
        return [f"  {name}:  # {why}", *items]
    return [f"  {name}: {_in_line(value)}  # {_one_line(why)}"]


def _in_line(value: Any) -> str:
    dumped = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return dumped.removesuffix("\n...\n").strip()
