"""What was aimed at, what was measured, and, where it was missed, the counts behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.against_trl.cases import ULTRAFEEDBACK
from benchmarks.against_trl.results.figures import Figures, difference, of_case

LOSSES = 1e-4  # at most between the systems


@dataclass(frozen=True)
class Target:
    what: str
    goal: float
    at_least: bool
    found: float
    form: str  # of both numbers
    counts: str  # that explain the figure

    @property
    def met(self) -> bool:
        return self.found >= self.goal if self.at_least else self.found <= self.goal

    @property
    def cells(self) -> tuple[str, str, str, str]:
        sign = ">=" if self.at_least else "<="
        return (
            self.what, f"{sign} {self.form.format(self.goal)}", self.form.format(self.found),
            "met" if self.met else f"**missed**: {self.counts}",
        )  # fmt: skip


def targets(results: dict[str, Any]) -> list[Target]:
    return [
        *_speed(results),
        *_product(results),
        *_exchanged(results),
        *_losses(results),
        *_fullness(results["fullness"]),
        *_exports(results["exports"]),
    ]


def pair_of(results: dict[str, Any], name: str) -> tuple[Figures, Figures] | None:
    """(TRL's figures, ours) of a case."""
    for case in results["cases"]:
        if case["name"] == name:
            found = of_case(case)
            return found["trl"], found["ours"]
    return None


def _speed(results: dict[str, Any]) -> Iterator[Target]:
    goals = {
        ULTRAFEEDBACK: (("train", 3.0), ("reference", 2.2)),
        "4 answers": (("train", 6.0),),
        "75 % prompt": (("train", 4.0),),
    }
    words = {"train": "training", "reference": "reference pass"}
    for name, wanted in goals.items():
        found = pair_of(results, name)
        if found is None:
            continue
        trl, ours = found
        tokens = trl["tokens_per_unique"] / ours["tokens_per_unique"]
        counts = f"{tokens:.2f}x as many tokens in TRL"
        if "tflop" in ours:
            counts += f", {trl['tflop'] / ours['tflop']:.2f}x as many FLOPs"
        for figure, goal in wanted:
            ratio = ours[figure] / trl[figure]
            what = f"{name}: {words[figure]}, pairs/s over TRL's"
            yield Target(what, goal, True, ratio, "{:.2f}x", counts)
        if name == ULTRAFEEDBACK:
            yield from _memory(trl, ours)


def _memory(trl: Figures, ours: Figures) -> Iterator[Target]:
    counts = f"{ours['mib']:,.0f} of {trl['mib']:,.0f} MiB; weights and optimizer are in both"
    ratio = ours["mib"] / trl["mib"]
    yield Target("peak memory of training over TRL's", 0.5, False, ratio, "{:.2f}x", counts)
    if "live_mib" in ours:
        ratio = ours["live_mib"] / trl["live_mib"]
        counts = (
            f"{ours['live_mib']:,.0f} of {trl['live_mib']:,.0f} MiB that a step makes: gradients "
            "and moments in both"
        )
        what = "the same in live storages of a step"
        yield Target(what, 0.5, False, ratio, "{:.2f}x", counts)


def _product(results: dict[str, Any]) -> Iterator[Target]:
    found = pair_of(results, ULTRAFEEDBACK)
    if found is None or "tflops" not in found[1]:
        return
    peak = max(each["tflops"] for each in results["peaks"])
    trl, ours = (figures["tflops"] / peak for figures in found)
    counts = (
        f"{100 * trl:.0f} % in TRL; attention and the optimizer take time and are no FLOPs here"
    )
    yield Target("share of the matrix-product peak in training, one rank", 75, True, 100 * ours,
                 "{:.0f} %", counts)  # fmt: skip


def _exchanged(results: dict[str, Any]) -> Iterator[Target]:
    for case in results["cases"]:
        if case["case"]["ranks"] == 1:
            continue
        trl, ours = (of_case(case)[system] for system in ("trl", "ours"))
        batches = f"{ours['micro_batches']} micro-batches and {trl['micro_batches']} in TRL"
        for key, what, form in (
            ("calls", "collectives", "{:,}"),
            ("mib_exchanged", "bytes", "{:,.0f} MiB"),
        ):
            counts = f"{form.format(ours[key])} of {form.format(trl[key])}, {batches}"
            ratio = ours[key] / trl[key]
            yield Target(f"{case['name']}: {what} of a step over TRL's", 0.5, False, ratio,
                         "{:.2f}x", counts)  # fmt: skip


def _losses(results: dict[str, Any]) -> Iterator[Target]:
    """Of all steps; with an adapter, whose random half differs, of the first."""
    worst, where = 0.0, ""
    for case in results["cases"]:
        found = of_case(case)
        steps = slice(1) if case["case"]["adapter"] else slice(None)
        for system, figures in found.items():
            one, other = ({"losses": f["losses"][steps]} for f in (found["trl"], figures))
            if (away := difference(one, other, "losses")) >= worst:
                worst, where = away, f"{case['name']}, {system}"
    yield Target("largest difference of a loss from TRL's", LOSSES, False, worst, "{:.1e}", where)


def _fullness(found: dict[str, Any]) -> Iterator[Target]:
    lines = found["lines"]
    for key, what, goal, at_least, form in (
        ("fill", "tokens of training over their budget", 0.95, True, "{:.3f}"),
        ("reference_fill", "tokens of the reference pass over their budget", 0.95, True, "{:.3f}"),
        ("imbalance", "fullest rank over the mean", 0.03, False, "{:.3f}"),
    ):
        worst = (min if at_least else max)(lines, key=lambda line: line[key])
        best = (max if at_least else min)(line[key] for line in lines)
        where = f"with {worst['ranks']} ranks and {worst['budget']:,} tokens; at best {best:.3f}"
        yield Target(f"{what}, the worst plan", goal, at_least, worst[key], form, where)


def _exports(found: dict[str, Any]) -> Iterator[Target]:
    for name, both in found.items():
        for key, what, goal in (
            ("mib", "peak memory", 0.3),
            ("written_mib", "bytes written", 0.75),
        ):
            ours, theirs = both["ours"][key], both["theirs"][key]
            counts = f"{ours:,.0f} of {theirs:,.0f} MiB"
            yield Target(
                f"export over {name}: {what}", goal, False, ours / theirs, "{:.2f}x", counts
            )
