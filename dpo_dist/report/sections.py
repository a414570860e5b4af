"""The sections of a run's report, each from what one or two stages have left."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_dist import __version__
from dpo_dist.metrics.curves import HELD_OUT, PLOTS, Line, finite, points, spread
from dpo_dist.report import charts
from dpo_dist.report.page import Html, chart, grid, heading, note, number, table
from dpo_dist.run.run_dir import step_of

NUM_SAMPLES = 12  # answers shown; the files have all
NUM_EVALUATIONS = 20  # rows of the table; the curves have all
SHOWN = ("rewards/accuracies", "rewards/margins", "logps/accuracies")


def curves(lines: Sequence[Line]) -> Iterator[Html]:
    """The plots, and the range of every training metric."""
    drawn = charts.drawable(lines, PLOTS)
    if not drawn:
        return
    yield grid(chart(plot.title, charts.curve_svg(lines, plot)) for plot in drawn)
    names = dict.fromkeys(
        name
        for line in lines
        for name in line
        if name not in ("step", "time", "non_finite") and not name.startswith(HELD_OUT)
    )
    rows = []
    for name in names:
        steps, values = points(lines, name)
        known = finite(values)
        ends = (steps[0], values[0], steps[-1], values[-1])
        rows.append((name, *ends, min(known, default=None), max(known, default=None)))
    head = ("training metric", "first step", "first", "last step", "last", "lowest", "highest")
    yield table(head, rows)


def held_out(lines: Sequence[Line], evaluated: Mapping[str, Any]) -> Iterator[Html]:
    """Export by source, against the start if that is known, and the evaluations of the training."""
    if evaluated:
        states = [state for state in ("before", "after") if state in evaluated]
        groups = {"all": [evaluated[state] for state in states]} | {
            name: [evaluated[state]["per_source"][name] for state in states]
            for name in evaluated["after"]["per_source"]
        }
        head = ["source", "pairs", *(f"{name} {state}" for name in SHOWN for state in states)]
        rows = [
            (name, group[-1]["num_pairs"], *(means[m] for m in SHOWN for means in group))
            for name, group in groups.items()
        ]
        what = "Export against the start" if "before" in states else "The export"
        yield heading(f"{what} (dpo-dist evaluate)")
        yield table(head, rows)
    evaluations = [line for line in lines if f"{HELD_OUT}loss" in line]
    if evaluations:
        names = [name for name in evaluations[-1] if name.startswith(HELD_OUT)]
        yield heading("During training")
        yield table(
            ("step", *(name.removeprefix(HELD_OUT) for name in names)),
            [
                (line["step"], *(line.get(name) for name in names))
                for line in spread(evaluations, NUM_EVALUATIONS)
            ],
        )


def samples(answers: Sequence[Mapping[str, Any]], sampled: Sequence[Line]) -> Iterator[Html]:
    """Answers of base model and export, and of the policy at the first and last sampled step."""
    if answers:
        names = ("prompt", "before", "after")
        yield heading("Base model and export (dpo-dist generate)")
        rows = [[row[name].strip() for name in names] for row in answers[:NUM_SAMPLES]]
        yield table(names, rows, texts=True)
    if sampled:
        steps = sorted({line["step"] for line in sampled})
        first, last = (
            {line["number"]: line for line in sampled if line["step"] == step}
            for step in (steps[0], steps[-1])
        )
        rows = [
            [line["prompt"].strip(), first.get(n, {}).get("answer", "-").strip(),
             line["answer"].strip()]
            for n, line in list(last.items())[:NUM_SAMPLES]
        ]  # fmt: skip
        yield heading("During training")
        yield table(("prompt", f"step {steps[0]}", f"step {steps[-1]}"), rows, texts=True)


def checkpoints(found: Sequence[Path], status: Mapping[str, Any]) -> Iterator[Html]:
    """The committed folders and which of them is best."""
    if not found:
        return
    best = status.get("best_checkpoint")
    rows = [
        (path.name, step_of(path), _size_mib(path), "best" if str(path) == best else "")
        for path in found
    ]
    yield table(("folder", "step", "MiB", ""), rows)
    if best:
        yield note(f"Best by {status['best_by']}: {number(status['best_metric'])}.")


def _size_mib(folder: Path) -> float | None:
    """Size of a folder's files; None when training prunes it at this moment."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    except FileNotFoundError:
        return None


def export(verified: Mapping[str, Any]) -> Iterator[Html]:
    """Every check of the export."""
    if not verified:
        return
    verdict = "Verified" if verified["passed"] else "NOT verified"
    yield note(
        f"{verdict}: a fresh load against {verified['num_probe_pairs']} pairs of the probe of "
        f"{Path(verified['checkpoint']).name}"
    )
    rows = [
        (check["name"], "passed" if check["passed"] else "FAILED", check["detail"],
         check["max_difference"], check["tolerance"])
        for check in verified["checks"]
    ]  # fmt: skip
    yield table(("check", "result", "detail", "largest difference", "tolerance"), rows)


def settings(config: Mapping[str, Any]) -> Iterator[Html]:
    """Every key of the resolved run config that has a value."""
    rows = list(_flat(config, ""))
    if rows:
        half = (len(rows) + 1) // 2
        yield grid(table(("key", "value"), part) for part in (rows[:half], rows[half:]) if part)


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(section.key, value) of a nested mapping; entries of a list by their position."""
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield f"{prefix}{key}", number(value) if isinstance(value, float) else str(value)


def environment(
    status: Mapping[str, Any], state: Mapping[str, Any], doctor: Mapping[str, Any]
) -> Iterator[Html]:
    """Versions and machines; `state` is the newest checkpoint's, empty before there is one."""
    software = [("dpo-dist", __version__), *state.get("versions", {}).items()]
    place: list[tuple[str, Any]] = [("host of rank 0", status.get("host", "-"))]
    if state:
        place += [("ranks in training", state["world_size"]), ("ZeRO stage", state["zero_stage"])]
    place.append(("restarts", status.get("restarts", {}).get("total", 0)))
    for rank, seen in enumerate(doctor.get("ranks", [])):
        gpus = ", ".join(f"{gpu['name']} ({gpu['gib']} GiB)" for gpu in seen["gpus"]) or "no GPU"
        place.append((f"rank {rank}: {seen['host']}", f"{seen['cores']} cores, {gpus}"))
    yield grid((
        heading("Software") + table(("package", "version"), software),
        heading("Machines") + table(("machine", "value"), place),
    ))  # fmt: skip
