"""The curves of reports, model cards and sweeps: SVG inside a page, PNG files beside it.

matplotlib is imported only to draw, since that takes half a second. In a page the texts of a chart
stay texts and its colors are the page's CSS variables, so it follows the reader's color scheme.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_dist.metrics.curves import HELD_OUT, Line, Plot, finite, points, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (5.6, 2.9)
DPI = 180
FEW = 40  # points; so many are drawn as they are, more with a smoothed line over them
COLORS = {  # CSS variable -> its color in the light and in the dark scheme; pictures have the light
    "paper": ("#ffffff", "#14171d"),
    "panel": ("#f5f6f9", "#1c2028"),
    "ink": ("#1c2430", "#e7e9ee"),
    "soft": ("#5b6675", "#9aa3b2"),
    "rule": ("#dfe3e8", "#343b48"),
    # blue and vermilion of Okabe and Ito, which the color-blind tell apart
    "first": ("#0072b2", "#6cb4ee"),
    "second": ("#d55e00", "#f5a04d"),
}
INK, SOFT, RULE, FIRST, SECOND = (
    COLORS[name][0] for name in ("ink", "soft", "rule", "first", "second")
)
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a page has the reader's own
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,  # points; 10,000 steps: 0.6 MB for all curves instead of 1.7
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo-dist",  # the same numbers give the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def drawable(lines: Sequence[Line], plots: Sequence[Plot]) -> list[Plot]:
    """Those of the plots that the lines have numbers for."""

    def has_numbers(plot: Plot) -> bool:
        names = [prefix + name for name in plot.metrics for prefix in ("", HELD_OUT)]
        return any(finite(points(lines, name)[1]) for name in names)

    return [plot for plot in plots if has_numbers(plot)]


def curve_svg(lines: Sequence[Line], plot: Plot) -> str:
    """The curves of a plot, without a title: a page has it as text."""
    with drawing() as figure:
        _curves(figure, lines, plot)
        return _svg(figure)


def write_pictures(lines: Sequence[Line], plots: Sequence[Plot], folder: Path) -> dict[str, str]:
    """Draws NAME.png into the folder for each drawable plot; returns title -> file name.

    Raises OSError when a file cannot be written.
    """
    written: dict[str, str] = {}
    for plot in drawable(lines, plots):
        folder.mkdir(parents=True, exist_ok=True)
        with drawing() as figure:
            _curves(figure, lines, plot).set_title(plot.title)
            (folder / f"{plot.name}.png").write_bytes(png(figure))
        written[plot.title] = f"{plot.name}.png"
    return written


@contextmanager
def drawing(size: tuple[float, float] = SIZE_INCHES) -> Iterator["Figure"]:
    """An empty figure of (width, height) inches in our style; needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=size, dpi=DPI)


def ranked_colors(count: int) -> list[Any]:
    """A color for each of so many curves, the best first."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * rank / max(count - 1, 1)) for rank in range(count)]


def png(figure: "Figure") -> bytes:
    """The bytes of a PNG file, on white."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _svg(figure: "Figure") -> str:
    """The <svg> element: texts as texts, no ids that a second chart of the page has too."""
    image = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(image, format="svg", transparent=True, metadata=unsaid)
    text = image.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)  # of the whole page
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # but of markers and clip paths
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    return text


def _curves(figure: "Figure", lines: Sequence[Line], plot: Plot) -> "Axes":
    axes = figure.subplots()
    for name, color in zip(plot.metrics, (FIRST, SECOND), strict=False):
        part = f"{name.rsplit('/', 1)[-1]}, " if len(plot.metrics) > 1 else ""
        steps, values = points(lines, name)
        smooth = plot.smooth and len(values) > FEW
        if smooth:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
        if values:
            shown, said = (smoothed(values), ", smoothed") if smooth else (values, "")
            look = {"linewidth": 1.4, "marker": "" if len(values) > FEW else "."}
            axes.plot(steps, shown, color=color, label=f"{part}training{said}", **look)
        steps, values = points(lines, HELD_OUT + name)
        if values:
            look = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 3.5}
            axes.plot(steps, values, color=color, label=f"{part}held-out", **look)
    axes.set(xlabel="optimizer step", ylabel=plot.axis)
    axes.margins(x=0.02)
    _plain_numbers(axes, whole="x")
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    low, high = axes.get_ylim()
    if low < 0 < high:
        axes.axhline(0, color=SOFT, linewidth=0.8)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside lower left", ncols=2)
    return axes


def _plain_numbers(axes: "Axes", whole: Literal["x", "y"]) -> None:
    """Ticks without a multiplier beside the axis; whole numbers on one of the axes."""
    axes.locator_params(whole, integer=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.6g}")
