"""PNG plots of a run's metrics, for its report and for the cards of its exports."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_dist.metrics.curves import HELD_OUT, Line, Plot, points, smoothed

SIZE_INCHES = (6.4, 3.3)
DPI = 160
FEW = 40  # points; so many are drawn as they are, more with a smoothed line over them
# color-blind safe (Okabe and Ito); the first of a picture with one metric, then the second
COLOURS = ("#0072b2", "#d55e00")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_plots(lines: Sequence[Line], plots: Sequence[Plot], folder: Path) -> list[Plot]:
    """Draws NAME.png into the folder for each plot that the lines have numbers for.

    Returns those, in order. Raises OSError when a file cannot be written.
    """
    drawn = [plot for plot in plots if any(_finite(lines, name) for name in plot.metrics)]
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
        with _pyplot() as pyplot:
            for plot in drawn:
                figure, axes = pyplot.subplots(figsize=SIZE_INCHES, dpi=DPI)
                try:
                    _draw(axes, lines, plot)
                    figure.tight_layout()
                    figure.savefig(plot_path(folder, plot))
                finally:
                    pyplot.close(figure)
    return drawn


def plot_path(folder: Path, plot: Plot) -> Path:
    """The file of a plot in a folder."""
    return folder / f"{plot.name}.png"


@contextlib.contextmanager
def _pyplot() -> Iterator[Any]:
    """matplotlib without a display, in our style, and as it was before afterward."""
    import matplotlib
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    with matplotlib.rc_context(STYLE):
        yield pyplot


def _finite(lines: Sequence[Line], name: str) -> bool:
    return any(math.isfinite(v) for p in ("", HELD_OUT) for v in points(lines, p + name)[1])


def _draw(axes: Any, lines: Sequence[Line], plot: Plot) -> None:
    for name, color in zip(plot.metrics, COLOURS, strict=False):
        part = f"{name.rsplit('/', 1)[-1]}, " if len(plot.metrics) > 1 else ""
        steps, values = points(lines, name)
        few = len(values) <= FEW
        raw = {"linewidth": 1.2, "marker": ".", "alpha": 0.6} if few else {"linewidth": 0.6}
        label = f"{part}training" if few else None
        if values:
            axes.plot(steps, values, color=color, **({"alpha": 0.25} | raw), label=label)
        if not few:
            mean = {"linewidth": 1.4, "label": f"{part}training, smoothed"}
            axes.plot(steps, smoothed(values), color=color, **mean)
        steps, values = points(lines, HELD_OUT + name)
        if values:
            held_out = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 4}
            axes.plot(steps, values, color=color, **held_out, label=f"{part}held-out")
    axes.set_title(plot.title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.axis)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    low, high = axes.get_ylim()
    if low < 0 < high:
        axes.axhline(0, color="#8a8f98", linewidth=0.8)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()
