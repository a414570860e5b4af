"""The rows of a plan, and how they are shown: a line each for a terminal, or a mapping for JSON."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.planning.estimate import GIB
from dpo_dist.planning.remedies import Remedy


@dataclass(frozen=True)
class Row:
    """A value under a key that names its unit; `why` is its arithmetic, or why it is missing."""

    key: str
    value: float | str | None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Rows by section, whether they fit, and what would help where memory does not suffice."""

    sections: dict[str, list[Row]]
    fits: bool | None
    disk_fits: bool
    remedies: list[Remedy]


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything for `--json`: values by section, and the arithmetic of each under its own key."""
    sections = {
        title.lower().replace(" of a ", "_per_").replace(" ", "_"): rows
        for title, rows in plan.sections.items()
    }
    return {
        "fits": plan.fits,
        "disk_fits": plan.disk_fits,
        "remedies": [
            {"change": r.change, "peak_gib": r.peak_bytes / GIB, "fits": r.fits}
            for r in plan.remedies
        ],
        **{name: {row.key: row.value for row in rows} for name, rows in sections.items()},
        "arithmetic": {
            f"{name}.{row.key}": row.why
            for name, rows in sections.items()
            for row in rows
            if row.why
        },
    }


def as_text(plan: Plan) -> str:
    """The plan for a terminal: a line a row, value and arithmetic."""
    lines: list[str] = []
    for title, rows in plan.sections.items():
        lines += ["", title]
        for row in rows:
            label = row.key.removesuffix("_gib").removeprefix("num_").replace("_", " ")
            lines.append(f"  {label:<23} {_shown(row):>10}  {row.why}".rstrip())
    if plan.remedies:
        lines += ["", "what would help, each by itself"]
        for remedy in plan.remedies:
            verdict = "fits" if remedy.fits else "does not fit"
            lines.append(f"  {remedy.change:<34} {in_gib(remedy.peak_bytes):>10}  {verdict}")
    return "\n".join(lines[1:])


def _shown(row: Row) -> str:
    match row.value:
        case None:
            return "unknown"
        case bool():
            return "yes" if row.value else "no"
        case int() | float() if row.key.endswith("_gib"):
            return in_gib(row.value * GIB)
        case int():
            return f"{row.value:,}"
        case float():
            return f"{row.value:,.1f}" if row.value >= 10 else f"{row.value:.3g}"
    return str(row.value)


def in_gib(num_bytes: float) -> str:
    """1.5 GiB, or 20.0 MiB below one."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"
