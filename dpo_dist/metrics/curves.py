"""The curves of a run: which metrics are drawn together, and what their trend warns of."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HELD_OUT = "eval_"  # before a metric's name: over the held-out pairs
NUM_FEWEST = 10  # training lines; fewer do not tell a trend from noise
WINDOW_SHARE = 0.2  # of the training lines, at either end, whose means are compared
SMALLEST_FALL = 0.01  # of the log-prob at the start; less is not worth a warning

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """One picture: its file's stem, its heading, what the vertical axis shows, and the metrics."""

    name: str
    title: str
    axis: str
    metrics: tuple[str, ...]
    smooth: bool = True  # whether many points are drawn as a mean over them
    from_zero: bool = False  # whether the vertical axis begins there


QUALITY_PLOTS = (
    Plot("loss", "Loss", "loss, mean over pairs", ("loss",)),
    Plot("rewards", "Rewards", "implicit reward", ("rewards/chosen", "rewards/rejected")),
    Plot("margins", "Reward margin", "chosen - rejected", ("rewards/margins",)),
    Plot("accuracies", "Reward accuracy", "share of pairs", ("rewards/accuracies",)),
    Plot("logps", "Log-probs", "nats per completion", ("logps/chosen", "logps/rejected")),
)
PLOTS = (
    *QUALITY_PLOTS,
    Plot("grad_norm", "Gradient norm", "L2 norm before clipping", ("grad_norm",)),
    Plot("learning_rate", "Learning rate", "learning rate", ("learning_rate",), smooth=False),
    Plot(
        "throughput",
        "Throughput",
        "tokens per second, all ranks",
        ("tokens_per_second",),
        from_zero=True,
    ),
    Plot(
        "memory",
        "Peak memory",
        "GiB, fullest rank",
        ("peak_memory_gib",),
        smooth=False,
        from_zero=True,
    ),
)


def points(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric; NaN where a line says that the number was not finite."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return (
        [step for step, _ in found],
        [float(value) if isinstance(value, int | float) else math.nan for _, value in found],
    )


def finite(values: Sequence[float]) -> list[float]:
    """Those of the values that are numbers."""
    return [value for value in values if math.isfinite(value)]


def spread(lines: Sequence[Line], most: int) -> list[Line]:
    """At most so many of the lines, evenly spaced, the first and the last among them."""
    last = len(lines) - 1
    return [lines[i] for i in sorted({round(k * last / (most - 1)) for k in range(most)})]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the points; NaNs are stepped over."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        if not math.isnan(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return means


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run, and what of the difference may be chance."""

    first: float
    last: float
    noise: float

    @property
    def falls(self) -> bool:
        """Whether it is lower at the end by more than chance and by more than a trifle."""
        return self.first - self.last > max(self.noise, SMALLEST_FALL * abs(self.first))


def change_of(lines: Sequence[Line], name: str) -> Change | None:
    """How a metric of the training batches changed; None when there are too few lines to tell.

    Means over the first and the last fifth of the lines; the noise is two standard errors of
    their difference. For a held-out metric the first and the last evaluation, which see the
    same pairs and so have no noise.
    """
    values = finite(points(lines, name)[1])
    if name.startswith(HELD_OUT):
        return Change(values[0], values[-1], 0.0) if len(values) > 1 else None
    if len(values) < NUM_FEWEST:
        return None
    width = max(NUM_FEWEST // 2, round(len(values) * WINDOW_SHARE))
    first, last = values[:width], values[-width:]
    variances = statistics.variance(first) + statistics.variance(last)
    return Change(statistics.mean(first), statistics.mean(last), 2 * math.sqrt(variances / width))


def displacement(lines: Sequence[Line]) -> str | None:
    """A warning when chosen and rejected both became less likely, with the numbers; else None.

    DPO only asks for a margin, which also grows while both log-probs fall and probability goes
    to answers that are neither: likelihood displacement, Razin et al. 2024 (arXiv:2410.08847).
    """
    for prefix, where in ((HELD_OUT, "held-out pairs"), ("", "training batches")):
        chosen, rejected = (
            change_of(lines, f"{prefix}logps/{side}") for side in ("chosen", "rejected")
        )
        if chosen and rejected and chosen.falls and rejected.falls:
            return (
                "Likelihood displacement: the log-probs of chosen and of rejected answers both "
                f"fall ({where}: chosen {_arrow(chosen)}, rejected {_arrow(rejected)}). "
                "Probability goes to answers that are neither: read the samples. To limit it, "
                "lower train.learning_rate, raise objective.beta or train for fewer steps."
            )
    return None


def _arrow(change: Change) -> str:
    noise = f", noise {change.noise:.1f}" if change.noise else ""
    difference = change.last - change.first
    return f"{change.first:.1f} -> {change.last:.1f} nats ({difference:+.1f}{noise})"
