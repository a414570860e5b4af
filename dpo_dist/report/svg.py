"""Small charts as SVG text for a self-contained page: no scripts, no fonts, no other file.

`STYLE` goes into the page once; it follows the reader's light or dark setting. Every text that is
handed in is escaped. Charts scale with their column; a value is shown when the pointer rests on it.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence

from dpo_dist.wording import nice_step

WIDTH, HEIGHT = 460, 210  # of a plot in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 10, 42  # room for ticks and labels
NUM_TICKS = 6
BAR_HEIGHT, BAR_GAP, BAR_LABEL = 18, 8, 150
NUM_COLORS = 6

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --faint: #667085; --rule: #d7dbe3;
  --paper: #ffffff; --panel: #f5f6f9; --c0: #2f6fde; --c1: #d9720f; --c2: #1f8f6b; --c3: #a445b2;
  --c4: #b3402e; --c5: #6b7486; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --faint: #9aa3b2; --rule: #343b48;
  --paper: #14171d; --panel: #1c2028; --c0: #6ea1ff; --c1: #f5a04d; --c2: #4fc79b; --c3: #d488e0;
  --c4: #ef8674; --c5: #9aa3b2; } }
svg.chart { display: block; width: 100%; max-width: 720px; height: auto;
  font: 12px system-ui, sans-serif; }
svg.chart text { fill: var(--faint); }
svg.chart .grid { stroke: var(--rule); }
svg.chart .axis { stroke: var(--faint); }
svg.chart path { fill: none; stroke-width: 2; stroke-linejoin: round; }
.k0 { --c: var(--c0); } .k1 { --c: var(--c1); } .k2 { --c: var(--c2); }
.k3 { --c: var(--c3); } .k4 { --c: var(--c4); } .k5 { --c: var(--c5); }
svg.chart .area { fill: var(--c); fill-opacity: 0.28; stroke: var(--c); }
svg.chart .line { stroke: var(--c); }
svg.chart .bar { fill: var(--c); }
svg.chart .hover { fill: transparent; }
svg.chart .hover:hover { fill: var(--faint); fill-opacity: 0.12; }
svg.chart .label { fill: var(--ink); }
"""


def histogram(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    x_label: str,
    y_label: str = "pairs",
    signed: bool = False,
) -> str:
    """Counts between N + 1 edges, N of each series; more than one are laid over each other.

    `signed` gives bins below and above zero colors of their own.
    """
    top = max((max(values, default=0) for values in counts.values()), default=0)
    plot = _Plot(edges[0], edges[-1], 0, _ceiling(top))
    parts = [*plot.axes(x_label, y_label)]
    for index, values in enumerate(counts.values()):
        if len(counts) > 1:
            parts.append(
                f'<path class="area k{index % NUM_COLORS}" d="{_steps(plot, edges, values)}"/>'
            )
            continue
        for low, high, count in zip(edges, edges[1:], values, strict=False):
            color = 1 if signed and high <= 0 else 0
            x, width = plot.x(low) + 0.5, plot.x(high) - plot.x(low) - 1
            y = plot.y(count)
            parts.append(
                f'<rect class="bar k{color}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{max(width, 1):.1f}" height="{plot.y(0) - y:.1f}"/>'
            )
    for index, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        shown = ", ".join(f"{name} {values[index]:,}" for name, values in counts.items())
        x, width = plot.x(low), plot.x(high) - plot.x(low)
        parts.append(
            f'<rect class="hover" x="{x:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{_tick(low)} to {_tick(high)}: '
            f"{html.escape(shown)}</title></rect>"
        )
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Curves of (x, y) points; points that are not finite are left out."""
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [point for points in finite.values() for point in points] or [(0.0, 0.0)]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    ticks = _ticks(min(ys), max(ys))
    plot = _Plot(min(xs), max(xs), min(ticks[0], *ys), max(ticks[-1], *ys))
    parts = [*plot.axes(x_label, y_label)]
    for index, (name, points) in enumerate(finite.items()):
        path = " ".join(
            f"{'L' if at else 'M'}{plot.x(x):.1f} {plot.y(y):.1f}"
            for at, (x, y) in enumerate(points)
        )
        last = f", last {points[-1][1]:.4g} at {_tick(points[-1][0])}" if points else ""
        parts.append(
            f'<path class="line k{index % NUM_COLORS}" d="{path}">'
            f"<title>{html.escape(name)}{last}</title></path>"
        )
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def bars(values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars with their names before and their numbers behind them."""
    top = max(values.values(), default=0) or 1
    room = WIDTH - BAR_LABEL - 80
    parts: list[str] = []
    for index, (name, value) in enumerate(values.items()):
        y = index * (BAR_HEIGHT + BAR_GAP)
        length = max(room * value / top, 1)
        middle = y + BAR_HEIGHT / 2 + 4
        parts += [
            f'<text class="label" x="{BAR_LABEL - 8}" y="{middle}" text-anchor="end">'
            f"{html.escape(name)}</text>",
            f'<rect class="bar k0" x="{BAR_LABEL}" y="{y}" width="{length:.1f}" '
            f'height="{BAR_HEIGHT}" rx="2"><title>{html.escape(name)}: {value:,} '
            f"{html.escape(unit)}</title></rect>",
            f'<text class="label" x="{BAR_LABEL + length + 6:.1f}" y="{middle}">{value:,}</text>',
        ]
    height = len(values) * (BAR_HEIGHT + BAR_GAP)
    return _svg(height, unit, parts)


def legend(names: Sequence[str]) -> str:
    """The names of series in the colors that a chart of them has."""
    items = (
        f'<span class="k{index % NUM_COLORS}"><i style="background:var(--c)"></i>'
        f"{html.escape(name)}</span>"
        for index, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


class _Plot:
    """Maps values to places in a chart."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right = left, right if right > left else left + 1
        self.low, self.high = low, high if high > low else low + 1

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> Iterator[str]:
        """Grid, ticks and labels."""
        bottom = HEIGHT - BOTTOM
        across = f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
        for value in _ticks(self.low, self.high):
            if self.low <= value <= self.high:
                y = self.y(value)
                yield f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>'
                place = f'x="{LEFT - 6}" y="{y + 4:.1f}"'
                yield f'<text {place} text-anchor="end">{_tick(value)}</text>'
        for value in _ticks(self.left, self.right):
            if self.left <= value <= self.right:
                yield (
                    f'<text x="{self.x(value):.1f}" y="{bottom + 16}" text-anchor="middle">'
                    f"{_tick(value)}</text>"
                )
        yield f'<line class="axis" {across} y1="{bottom}" y2="{bottom}"/>'
        if self.left < 0 < self.right:
            zero = self.x(0)
            yield f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield (
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{html.escape(x_label)}</text>"
        )
        middle = (TOP + bottom) / 2
        yield (
            f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(y_label)}</text>"
        )


def _steps(plot: _Plot, edges: Sequence[float], values: Sequence[int]) -> str:
    points = [f"M{plot.x(edges[0]):.1f} {plot.y(0):.1f}"]
    for low, high, count in zip(edges, edges[1:], values, strict=False):
        points.append(
            f"L{plot.x(low):.1f} {plot.y(count):.1f}L{plot.x(high):.1f} {plot.y(count):.1f}"
        )
    return "".join(points) + f"L{plot.x(edges[-1]):.1f} {plot.y(0):.1f}Z"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from the one at or below `low` to the one at or above `high`."""
    step = nice_step(high - low, NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _ceiling(top: float) -> float:
    return _ticks(0, top)[-1] if top else 1


def _tick(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
