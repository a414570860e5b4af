"""The two pictures of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.against_trl.results.figures import of_case
from dpo_dist.report.charts import FIRST, SECOND, SOFT, drawing, png

BARS = {"trl": ("TRL", SOFT), "alone": ("pairs alone", SECOND), "ours": ("dpo-dist", FIRST)}
Points = list[tuple[float, float]]


def write_pictures(results: dict[str, Any], folder: Path) -> dict[str, str]:
    """title -> file name of what was drawn."""
    drawn: dict[str, bytes] = {}
    training, reference = over_shares(results, "train"), over_shares(results, "reference")
    if training:
        drawn["shares"] = _shares(training, reference)
    if several := [case for case in results["cases"] if "alone" in case["systems"]]:
        drawn["answers"] = _answers(several)
    titles = {
        "shares": "pairs a second over TRL's, by the prompt's share of a sequence",
        "answers": "pairs a second in training, all pairs of several answers",
    }
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for name, image in drawn.items():
        (folder / f"{name}.png").write_bytes(image)
    return {titles[name]: f"{name}.png" for name in drawn}


def over_shares(results: dict[str, Any], figure: str) -> Points:
    """(percent, our pairs/s over TRL's) of the made-up rows with two answers, one rank."""
    points: Points = []
    for case in results["cases"]:
        rows = case["case"]["rows"]
        if case["name"].startswith("share") and rows["answers"] == 2:
            found = of_case(case)
            points.append((rows["share"], found["ours"][figure] / found["trl"][figure]))
    return sorted(points)


def _shares(training: Points, reference: Points) -> bytes:
    with drawing() as figure:
        axes = figure.subplots()
        for points, color, name in (
            (training, FIRST, "training"),
            (reference, SECOND, "reference pass"),
        ):
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=name)
        axes.axhline(1, color=SOFT, linewidth=0.8)
        axes.set(xlabel="prompt, percent of a sequence", ylabel="times TRL's pairs a second")
        axes.set_ylim(bottom=0)
        axes.legend()
        return png(figure)


def _answers(cases: list[dict[str, Any]]) -> bytes:
    with drawing() as figure:
        axes = figure.subplots()
        rates = [
            {system: found["train"] / of["trl"]["train"] for system, found in of.items()}
            for of in map(of_case, cases)
        ]
        for place, (system, (name, color)) in enumerate(BARS.items()):
            at = [number + 0.27 * (place - 1) for number in range(len(cases))]
            bars = axes.bar(at, [of[system] for of in rates], 0.25, color=color, label=name)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.set_xticks(range(len(cases)), [case["name"] for case in cases])
        axes.set_ylabel("times TRL's pairs a second")
        axes.grid(visible=False, axis="x")
        axes.legend()
        return png(figure)
