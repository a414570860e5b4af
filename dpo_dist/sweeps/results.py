"""What came out of a sweep: a table (terminal, JSON, CSV) and a plot.

Numbers are the last ones in each point's metrics file; pairs_per_second is all pairs over all
seconds of training. Points are sorted by held-out accuracy, then margin; without held-out pairs by
the same of the last training step.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_dist.metrics.curves import HELD_OUT, points
from dpo_dist.metrics.writer import read_lines
from dpo_dist.report import charts
from dpo_dist.run.logs import console
from dpo_dist.run.manifest import write_atomic, write_json
from dpo_dist.sweeps.points import Point, Sweep, state_of

# column -> (name in the metrics file, how it is shown)
COLUMNS = {
    "eval_accuracy": ("eval_rewards/accuracies", ".3f"),
    "eval_margin": ("eval_rewards/margins", ".4f"),
    "eval_loss": ("eval_loss", ".4f"),
    "train_loss": ("loss", ".4f"),
    "pairs_per_second": ("pairs_per_second", ".2f"),
}
PANELS = (  # title, name in the metrics file, name where there are no held-out pairs
    ("accuracy", "eval_rewards/accuracies", "rewards/accuracies"),
    ("reward margin", "eval_rewards/margins", "rewards/margins"),
    ("training loss", "loss", "loss"),
)
FEW = 20  # values of a curve; so many have a dot each
MAX_BARS = 24  # points whose accuracies are shown side by side

Row = dict[str, Any]


def collect(sweep: Sweep) -> list[Row]:
    """One row a point, the best first; points that are not done at the end."""
    rows = [_row(point, sweep.stages[-1].name) for point in sweep.points]

    def rank(row: Row) -> tuple[float, ...]:
        ranked = [row["eval_accuracy"], row["eval_margin"]]
        if ranked == [None, None]:
            ranked = [row["train_accuracy"], row["train_margin"]]
        done = 1.0 if row["state"] == "done" else 0.0
        return done, *(-math.inf if value is None else value for value in ranked)

    return sorted(rows, key=rank, reverse=True)


def _row(point: Point, last_stage: str) -> Row:
    state = state_of(point, last_stage)
    lines = _lines(point)
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    row: Row = {
        "name": point.name,
        "values": point.values,
        "state": state.name,
        "error": state.error,
        "run_dir": str(point.paths.root),
        "step": last.get("step"),
    }
    row |= {column: last.get(name) for column, (name, _) in COLUMNS.items()}
    row |= {
        "train_accuracy": last.get("rewards/accuracies"),
        "train_margin": last.get("rewards/margins"),
        "pairs_per_second": _pairs_per_second(lines),
    }
    return row


def _lines(point: Point) -> list[dict[str, Any]]:
    return read_lines(point.paths.metrics_path)


def _pairs_per_second(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Pairs of all windows over the seconds they took."""
    windows = [line for line in lines if line.get("pairs_per_second")]
    pairs, seconds, before = 0.0, 0.0, 0.0
    for line in windows:
        own = line["consumed_pairs"] - before
        before = line["consumed_pairs"]
        pairs, seconds = pairs + own, seconds + own / line["pairs_per_second"]
    return pairs / seconds if seconds else None


def write_results(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Writes results.json, results.csv and results.png."""
    write_json(sweep.root.sweep_results_path, {"keys": sweep.keys, "points": list(rows)})
    text = io.StringIO()
    columns = ["step", *COLUMNS, "train_accuracy", "train_margin", "state", "error", "run_dir"]
    table = csv.writer(text)
    table.writerow([*sweep.keys, *columns])
    for row in rows:
        values = [row["values"][key] for key in sweep.keys]
        table.writerow([*values, *(row[column] for column in columns)])
    write_atomic(sweep.root.sweep_table_path, text.getvalue())
    _plot(sweep, rows, sweep.root.sweep_plot_path)


def print_table(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Shows the points, and the errors of those that failed."""
    leaves = [key.rpartition(".")[2] for key in sweep.keys]
    names = leaves if len(set(leaves)) == len(leaves) else list(sweep.keys)
    table = Table(*names, *(column.replace("_", " ") for column in COLUMNS), "state")
    for row in rows:
        values = [str(row["values"][key]) for key in sweep.keys]
        numbers = [_shown(row[column], form) for column, (_, form) in COLUMNS.items()]
        table.add_row(*values, *numbers, row["state"])
    console.print(table)
    for row in rows:
        if row["error"]:
            console.print(f"{row['name']}: {row['error']}", markup=False, highlight=False)
    shown = (sweep.root.sweep_results_path, sweep.root.sweep_table_path, sweep.root.sweep_plot_path)
    for path in shown:
        if path.is_file():
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plot(sweep: Sweep, rows: Sequence[Row], path: Path) -> None:
    """Curves of every point, and the final accuracies side by side in the curves' colors."""
    lines_of = {point.name: _lines(point) for point in sweep.points}
    held_out = any("eval_loss" in line for lines in lines_of.values() for line in lines)
    with charts.drawing((12, 8)) as figure:
        *curves, last = figure.subplots(2, 2).flat
        colors = charts.ranked_colors(len(rows))
        for axes, (title, name, fallback) in zip(curves, PANELS, strict=True):
            name = name if held_out else fallback
            for row, color in zip(rows, colors, strict=True):
                steps, values = points(lines_of[row["name"]], name)
                axes.plot(steps, values, marker="." if len(steps) < FEW else "", color=color)
            where = "held-out" if name.startswith(HELD_OUT) else "training"
            axes.set_title(title if title.startswith(where) else f"{where} {title}")
            axes.set_xlabel("optimizer step")
        column = "eval_accuracy" if held_out else "train_accuracy"
        best = rows[:MAX_BARS]
        last.barh(
            [row["name"] for row in best],
            [row[column] or 0.0 for row in best],
            color=colors[: len(best)],
        )
        last.invert_yaxis()
        of_all = f", best {len(best)} of {len(rows)}" if len(best) < len(rows) else ""
        last.set_title(f"{'held-out' if held_out else 'training'} accuracy at the end{of_all}")
        write_atomic(path, charts.png(figure))
