"""The sections of a run's report, each from what one or two stages have left; HTML each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_dist import __version__
from dpo_dist.metrics.curves import HELD_OUT, PLOTS, Line, points
from dpo_dist.report.page import (
    columns,
    flatten,
    heading,
    number,
    paragraph,
    part_of,
    pictures,
    table,
)
from dpo_dist.report.plots import draw_plots, plot_path
from dpo_dist.run.run_dir import step_of

NUM_SAMPLES = 12  # answers shown; the files have all
NUM_EVALUATIONS = 20  # rows of the table; the curves have all
SHOWN = ("rewards/accuracies", "rewards/margins", "logps/accuracies")


def curves(lines: Sequence[Line], folder: Path) -> str:
    """The plots, drawn into the folder too, and the range of every training metric."""
    drawn = draw_plots(lines, PLOTS, folder)
    if not drawn:
        return paragraph("No step has been trained yet.")
    images = pictures((plot.title, plot_path(folder, plot).read_bytes()) for plot in drawn)
    names = dict.fromkeys(
        name
        for line in lines
        for name in line
        if name not in ("step", "time", "non_finite") and not name.startswith(HELD_OUT)
    )
    rows = []
    for name in names:
        steps, values = points(lines, name)
        rows.append((name, steps[0], values[0], steps[-1], values[-1], min(values), max(values)))
    head = ("training metric", "first step", "first", "last step", "last", "lowest", "highest")
    return images + table(head, rows)


def held_out(lines: Sequence[Line], evaluated: dict[str, Any]) -> str:
    """Export by source, against the start if that is known, and the evaluations of the training."""
    body = ""
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
        body += heading(f"{what} (dpo-dist evaluate)") + table(head, rows)
    evaluations = [line for line in lines if f"{HELD_OUT}loss" in line]
    if evaluations:
        names = [name for name in evaluations[-1] if name.startswith(HELD_OUT)]
        last = len(evaluations) - 1
        picked = {round(i * last / (NUM_EVALUATIONS - 1)) for i in range(NUM_EVALUATIONS)}
        shown = [evaluations[i] for i in sorted(picked)]
        rows = [(line["step"], *(line.get(name) for name in names)) for line in shown]
        head = ("step", *(name.removeprefix(HELD_OUT) for name in names))
        body += heading("During training") + table(head, rows)
    return body or paragraph("No held-out pairs have been evaluated yet.")


def samples(answers: Sequence[dict[str, Any]], sampled: Sequence[Line]) -> str:
    """Answers of base model and export, and of the policy at the first and last sampled step."""
    body = ""
    if answers:
        rows = [
            tuple(row[key].strip() for key in ("prompt", "before", "after"))
            for row in answers[:NUM_SAMPLES]
        ]
        body += heading("Base model and export (dpo-dist generate)")
        body += table(("prompt", "before", "after"), rows, texts=True)
    if sampled:
        steps = sorted({line["step"] for line in sampled})
        first, last = (
            {line["number"]: line for line in sampled if line["step"] == step}
            for step in (steps[0], steps[-1])
        )
        rows = [
            (
                line["prompt"].strip(),
                first.get(n, {}).get("answer", "-").strip(),
                line["answer"].strip(),
            )
            for n, line in list(last.items())[:NUM_SAMPLES]
        ]
        head = ("prompt", f"step {steps[0]}", f"step {steps[-1]}")
        body += heading("During training") + table(head, rows, texts=True)
    return body or paragraph(
        "None yet: run `dpo-dist generate`, or set eval.samples_every_steps before training."
    )


def data(report: dict[str, Any], shown: str) -> str:
    """Token lengths under `shown`, the HTML of the data report's own page."""
    if not report:
        return paragraph("No pairs have been prepared yet.")
    lengths = [
        (split, part, *values.values())
        for split, counts in report["splits"].items()
        for part, values in counts["lengths"].items()
        if values
    ]
    head = ("split", "part", "p50", "p90", "p99", "max")
    return part_of("data", shown) + heading("Tokens, truncated") + table(head, lengths)


def checkpoints(found: Sequence[Path], status: dict[str, Any]) -> str:
    """The committed folders and which of them is best."""
    if not found:
        return paragraph("None has been committed yet.")
    best = status.get("best_checkpoint")
    rows = []
    for path in found:
        mark = "best" if str(path) == best else ""
        rows.append((path.name, step_of(path), _size_mib(path), mark))
    body = table(("folder", "step", "MiB", ""), rows)
    if best:
        body += paragraph(f"Best by {status['best_by']}: {number(status['best_metric'])}.")
    return body


def _size_mib(folder: Path) -> float | None:
    """Size of a folder's files; None when training prunes it at this moment."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    except FileNotFoundError:
        return None


def export(verified: dict[str, Any]) -> str:
    """Every check of the export."""
    if not verified:
        return paragraph("Nothing has been exported and verified yet.")
    rows = [
        (
            check["name"],
            "passed" if check["passed"] else "FAILED",
            check["detail"],
            check["max_difference"],
            check["tolerance"],
        )
        for check in verified["checks"]
    ]
    verdict = "Verified" if verified["passed"] else "NOT verified"
    said = f"{verdict}: a fresh load against {verified['num_probe_pairs']} pairs of the probe of "
    return paragraph(said + Path(verified["checkpoint"]).name) + table(
        ("check", "result", "detail", "largest difference", "tolerance"), rows
    )


def settings(config_path: Path) -> str:
    """Every key of the resolved run config."""
    if not config_path.is_file():
        return paragraph(f"There is no {config_path.name} yet.")
    rows = flatten(yaml.safe_load(config_path.read_text(encoding="utf-8")))
    half = (len(rows) + 1) // 2
    return columns(*(table(("key", "value"), part) for part in (rows[:half], rows[half:])))


def environment(status: dict[str, Any], state: dict[str, Any], doctor: dict[str, Any]) -> str:
    """Versions and machines; `state` is the newest checkpoint's, empty before there is one."""
    software = [("dpo-dist", __version__), *state.get("versions", {}).items()]
    place: list[tuple[str, Any]] = [("host of rank 0", status.get("host", "-"))]
    if state:
        place += [("ranks in training", state["world_size"]), ("ZeRO stage", state["zero_stage"])]
    place.append(("restarts", status.get("restarts", {}).get("total", 0)))
    for rank, seen in enumerate(doctor.get("ranks", [])):
        gpus = ", ".join(f"{gpu['name']} ({gpu['gib']} GiB)" for gpu in seen["gpus"]) or "no GPU"
        place.append((f"rank {rank}: {seen['host']}", f"{seen['cores']} cores, {gpus}"))
    return columns(
        heading("Software") + table(("package", "version"), software),
        heading("Machines") + table(("what", "value"), [(k, str(v)) for k, v in place]),
    )
