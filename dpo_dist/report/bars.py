"""Charts of bars on the page of the pairs: SVG of `bars.svg.jinja`, in a millisecond each.

`prepare` has one for every source, and matplotlib needs a third of a second for each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.report.page import Html, template
from dpo_dist.wording import nice_step

# Points, as in `charts`.
WIDTH, HEIGHT = 403.0, 209.0
FONT = 9.0
DIGIT = 0.66 * FONT  # the width of a digit in the widest of the page's fonts
LETTER = 0.72 * FONT  # of a letter
TOP, BOTTOM, LEFT = 8.0, 36.0, 24.0  # margins; on the left the numbers come on top
LEGEND = 16.0
NUM_ROWS = 5  # parts between the horizontal lines
BAR, BAR_HEIGHT = 19.0, 14.0  # from one horizontal bar to the next
SERIES = ("first", "second")  # their colors


@dataclass(frozen=True)
class Axis:
    """From `low` to `high` in numbers, from `start` to `end` in points."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, step: float) -> list[tuple[float, str]]:
        """(place, text) of the multiples of `step`."""
        first, last = (math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9))
        return [(self.at(n * step), shown(n * step)) for n in range(first, last + 1)]


def histogram(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], x_label: str, signed: bool = False
) -> Html:
    """SVG of pairs between N + 1 edges, N counts of each series; two are laid over each other.

    `signed` gives bins below zero a color of their own. A bin tells its counts under the pointer.
    """
    several = len(counts) > 1
    highest = max((count for values in counts.values() for count in values), default=0)
    row = max(1.0, nice_step(highest, NUM_ROWS))
    rows = max(1, math.ceil(highest / row)) * row
    left = round(LEFT + DIGIT * len(shown(rows)), 2)
    across = Axis(edges[0], edges[-1], left, WIDTH - DIGIT * len(shown(edges[-1])) / 2 - 2)
    up = Axis(0, rows, HEIGHT - BOTTOM, TOP + LEGEND * several)
    every = zip(edges, edges[1:], *counts.values(), strict=False)
    bins = [(low, high, found) for low, high, *found in every if any(found)]
    return _parts().histogram(
        width=WIDTH, height=HEIGHT, font=FONT, left=left, right=across.end, top=up.end,
        base=up.start, x_label=x_label, rows=up.ticks(row), columns=_columns(across),
        shapes=_laid_over(edges, counts, across, up) if several
        else _side_by_side(bins, signed, across, up),
        legend=_legend(counts) if several else [],
        zero=across.at(0) if signed else None,
        tips=[(across.at(low), across.at(high), _tip(low, high, counts, found))
              for low, high, found in bins],
    )  # fmt: skip


def bars(values: Mapping[str, int]) -> Html:
    """SVG of horizontal bars, their names before and their numbers behind them."""
    left = round(8 + LETTER * max(map(len, values)), 2)
    behind = 10 + DIGIT * max(len(f"{value:,}") for value in values.values())
    across = Axis(0, max(1, *values.values()), left, max(left + 1, WIDTH - behind))
    drawn = [(name, f"{value:,}", across.at(value)) for name, value in values.items()]
    return _parts().bars(
        width=WIDTH, height=BAR * len(values), font=FONT, left=left, step=BAR, thick=BAR_HEIGHT,
        bars=drawn,
    )  # fmt: skip


def shown(value: float) -> str:
    return f"{value:,.6g}"


def _columns(across: Axis) -> list[tuple[float, str]]:
    """As many numbers below as leave a gap of two digits between them."""
    widest = max(len(shown(nice_step(edge, 1))) for edge in (across.low, across.high))
    room = (across.end - across.start) / (DIGIT * (widest + 3))
    return across.ticks(nice_step(across.high - across.low, max(1, int(room))))


def _side_by_side(
    bins: Iterable[tuple[float, float, Sequence[int]]], signed: bool, across: Axis, up: Axis
) -> list[tuple[str, str]]:
    """(color, path) of each bin."""
    return [
        (
            "second" if signed and high <= 0 else "first",
            _path((low, low + 0.88 * (high - low)), found, across, up),
        )
        for low, high, found in bins
    ]


def _laid_over(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], across: Axis, up: Axis
) -> list[tuple[str, str]]:
    """(color, path) of each series."""
    series = zip(SERIES, counts.values(), strict=False)
    return [(color, _path(edges, values, across, up)) for color, values in series]


def _path(edges: Sequence[float], values: Sequence[int], across: Axis, up: Axis) -> str:
    """Around bars that touch, from base to base."""
    points = [(edges[0], 0)]
    for low, high, value in zip(edges, edges[1:], values, strict=False):
        points += [(low, value), (high, value)]
    points += [(edges[-1], 0)]
    return "M " + " L ".join(f"{across.at(x):g} {up.at(y):g}" for x, y in points)


def _legend(names: Iterable[str]) -> list[tuple[str, str, float]]:
    """(name, color, place from the left)"""
    parts, place = [], 0.0
    for name, color in zip(names, SERIES, strict=False):
        parts.append((name, color, place))
        place += 24 + LETTER * len(name)
    return parts


def _tip(low: float, high: float, names: Iterable[str], found: Sequence[int]) -> str:
    told = ", ".join(f"{name} {value:,}" for name, value in zip(names, found, strict=True))
    return f"{shown(low)} to {shown(high)}: {told}"


def _parts() -> Any:
    return template("bars.svg.jinja").module
