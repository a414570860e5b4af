"""The result of the planner, and how it is shown: as text for a terminal, as a mapping for JSON."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.planning.remedies import Remedy
from dpo_dist.planning.sizes import GIB, in_gib


@dataclass(frozen=True)
class Entry:
    """A value under a key that names its unit; `why` is its arithmetic, or why it is missing."""

    key: str
    value: float | str | None
    why: str = ""


@dataclass(frozen=True)
class RunPlan:
    """What a run will need, whether it fits, and what would help where memory does not suffice."""

    groups: dict[str, list[Entry]]  # by the key of the group in JSON
    fits: bool | None
    disk_fits: bool
    remedies: list[Remedy]


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """Everything for `--json`: values by group, and the arithmetic of each under its own key."""
    return {
        "fits": plan.fits,
        "disk_fits": plan.disk_fits,
        "remedies": [
            {"change": r.change, "peak_gib": r.peak_bytes / GIB, "fits": r.fits}
            for r in plan.remedies
        ],
        **{group: {e.key: e.value for e in entries} for group, entries in plan.groups.items()},
        "arithmetic": {
            f"{group}.{entry.key}": entry.why
            for group, entries in plan.groups.items()
            for entry in entries
            if entry.why
        },
    }


def as_text(plan: RunPlan) -> str:
    """The plan for a terminal: label, value and arithmetic of an entry on one line."""
    lines: list[str] = []
    for group, entries in plan.groups.items():
        lines += ["", spelled(group)]
        for entry in entries:
            label = spelled(entry.key.removesuffix("_gib").removeprefix("num_"))
            lines.append(f"  {label:<23} {_shown(entry):>10}  {entry.why}".rstrip())
    if plan.remedies:
        width = max(34, *(len(remedy.change) for remedy in plan.remedies))
        lines += ["", "what would help, each on its own"]
        for remedy in plan.remedies:
            verdict = "fits" if remedy.fits else "does not fit"
            lines.append(f"  {remedy.change:<{width}} {in_gib(remedy.peak_bytes):>10}  {verdict}")
    return "\n".join(lines[1:])


def spelled(key: str) -> str:
    """A key as a label: "memory per GPU" of "memory_per_gpu"."""
    words = {"gpu": "GPU", "gflop": "GFLOP", "pflop": "PFLOP", "nf4": "NF4", "zero": "ZeRO"}
    return " ".join(words.get(word, word) for word in key.split("_"))


def _shown(entry: Entry) -> str:
    match entry.value:
        case None:
            return "unknown"
        case bool():
            return "yes" if entry.value else "no"
        case int() | float() if entry.key.endswith("_gib"):
            return in_gib(entry.value * GIB)
        case int():
            return f"{entry.value:,}"
        case float():
            return f"{entry.value:,.1f}" if entry.value >= 10 else f"{entry.value:.3g}"
    return str(entry.value)
