"""A run as one HTML page with its plots: `report/index.html`, at any point of the run.

1. Read what the stages have left in the run folder so far; nothing else is needed.
2. Draw the curves as PNG files, and put them into the page as well.
3. The folder appears under its name only when it is whole.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_dist import __version__
from dpo_dist.curves import HELD_OUT, PLOTS, Line, displacement, points
from dpo_dist.engine.train_state import TrainState, read_train_state
from dpo_dist.errors import ArtefactError, CheckpointError
from dpo_dist.manifest import atomic_dir
from dpo_dist.metrics import read_lines
from dpo_dist.plots import draw_plots, plot_path
from dpo_dist.report_page import (
    Section,
    columns,
    flatten,
    heading,
    number,
    page,
    paragraph,
    pictures,
    table,
)
from dpo_dist.run_dir import COMMIT_NAME, PAIRS_REPORT_NAME, REPORT_PAGE_NAME, RunDir, step_of
from dpo_dist.status import read_status

NUM_SAMPLES = 12  # answers shown; the files have all
NUM_EVALUATIONS = 20  # rows of the table; the curves have all
SHOWN = ("rewards/accuracies", "rewards/margins", "logps/accuracies")


def run(run_dir: Path) -> Path:
    """Writes the report of a run folder and returns its page.

    Raises ArtefactError when the folder is no run's, or when the report cannot be written; an
    older report then stays as it was.
    """
    paths = RunDir(run_dir)
    if not paths.status_path.is_file():
        raise ArtefactError(
            f"{paths.status_path} does not exist",
            "the folder of a run",
            "Name the run.dir of a run.yaml.",
        )
    try:
        with atomic_dir(paths.report_dir) as folder:
            (folder / REPORT_PAGE_NAME).write_text(_page(paths, folder), encoding="utf-8")
    except OSError as error:
        raise ArtefactError(
            f"{paths.report_dir} could not be written ({error.strerror or error})",
            "a writable folder with free space",
            "Mend that and run `dpo-dist report` again; nothing half-written is left.",
        ) from error
    return paths.report_dir / REPORT_PAGE_NAME


def _page(paths: RunDir, folder: Path) -> str:
    """The page; draws its pictures into the folder."""
    lines, status = read_lines(paths.metrics_path), read_status(paths.status_path)
    report = _read_json(paths.pairs_dir / PAIRS_REPORT_NAME)
    verified = _read_json(paths.verify_path)
    state = _newest_state(paths)
    sections = [
        Section("Curves", _curves(lines, folder)),
        Section("Held-out pairs", _held_out(lines, _read_json(paths.evaluate_path))),
        Section("Samples", _samples(paths)),
        Section("Data", _data(report)),
        Section("Checkpoints", _checkpoints(paths, status)),
        Section("Export", _export(verified)),
        Section("Settings", _settings(paths)),
        Section("Environment", _environment(status, state, _read_json(paths.doctor_path))),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return page(
        paths.root.resolve().name,
        f"dpo-dist {__version__}, report of {written}",
        _facts(lines, status),
        _warnings(lines, status, verified),
        sections,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run, {} when it is not there yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _last(lines: Sequence[Line], name: str) -> Any:
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _facts(lines: Sequence[Line], status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures at the top of the page."""
    yield "last stage", f"{status.get('stage', '-')} {status.get('state', '')}"
    train = status.get("train")
    if train:
        yield "optimizer steps", f"{train['step']:,} of {train['num_steps']:,}"
    for name, label in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        for prefix, where in ((HELD_OUT, "held-out"), ("", "training")):
            if (value := _last(lines, prefix + name)) is not None:
                yield f"reward {label}, {where}, last", number(value)
                break
    if speeds := points(lines, "pairs_per_second")[1]:
        yield "pairs a second, median", number(statistics.median(speeds))
        yield "in training steps", _duration(_seconds_trained(lines))
    if memory := points(lines, "peak_memory_gib")[1]:
        yield "peak memory, GiB", number(max(memory))


def _seconds_trained(lines: Sequence[Line]) -> float:
    """Seconds of the steps themselves: pairs of each line by the speed that it tells."""
    seconds, before = 0.0, 0.0
    for line in lines:
        if line.get("pairs_per_second"):
            seconds += (line["consumed_pairs"] - before) / line["pairs_per_second"]
            before = line["consumed_pairs"]
    return seconds


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _warnings(
    lines: Sequence[Line], status: dict[str, Any], verified: dict[str, Any]
) -> Iterator[str]:
    if status.get("early_stop"):
        yield f"Training ended early: {status['early_stop']}."
    if warning := displacement(lines):
        yield warning
    broken = [line["step"] for line in lines if line.get("non_finite")]
    if broken:
        yield f"{len(broken):,} lines hold numbers that are not finite, first at step {broken[0]}."
    for stage, own in status.get("stages", {}).items():
        if own.get("state") == "failed":
            yield f"{stage} failed: {own.get('error')}"
    if verified.get("passed") is False:
        yield "The export was not verified: see Export."


def _curves(lines: Sequence[Line], folder: Path) -> str:
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


def _held_out(lines: Sequence[Line], evaluated: dict[str, Any]) -> str:
    body = ""
    if evaluated:
        before, after = evaluated["before"], evaluated["after"]
        groups = {"all": (before, after)} | {
            name: (before["per_source"][name], after["per_source"][name])
            for name in after["per_source"]
        }
        head = ["source", "pairs"]
        head += [f"{name} {when}" for name in SHOWN for when in ("before", "after")]
        rows = [
            (name, old["num_pairs"], *(means[m] for m in SHOWN for means in (old, new)))
            for name, (old, new) in groups.items()
        ]
        body += heading("Export against the start (dpo-dist evaluate)") + table(head, rows)
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


def _samples(paths: RunDir) -> str:
    body = ""
    answers = _read_json(paths.generate_path).get("answers", [])
    if answers:
        rows = [
            tuple(row[key].strip() for key in ("prompt", "before", "after"))
            for row in answers[:NUM_SAMPLES]
        ]
        body += heading("Base model and export (dpo-dist generate)")
        body += table(("prompt", "before", "after"), rows, texts=True)
    samples = read_lines(paths.samples_path)
    if samples:
        steps = sorted({line["step"] for line in samples})
        first, last = (
            {line["number"]: line for line in samples if line["step"] == step}
            for step in (steps[0], steps[-1])
        )
        rows = [
            (line["prompt"].strip(), first.get(n, {}).get("answer", "-"), line["answer"].strip())
            for n, line in list(last.items())[:NUM_SAMPLES]
        ]
        head = ("prompt", f"step {steps[0]}", f"step {steps[-1]}")
        body += heading("During training") + table(head, rows, texts=True)
    return body or paragraph(
        "None yet: run `dpo-dist generate`, or set eval.samples_every_steps before training."
    )


def _data(report: dict[str, Any]) -> str:
    if not report:
        return paragraph("No pairs have been prepared yet.")
    sources, lengths, notes = [], [], []
    for split, counts in report["splits"].items():
        for name, source in counts["sources"].items():
            numbers = (source["rows"], source["pairs"])
            sources.append((split, name, source["format"], *numbers, _counts(source, "dropped")))
        for part, values in counts["lengths"].items():
            if values:
                lengths.append((split, part, *values.values()))
        for kind in ("dropped", "noted"):
            notes += [
                (split, kind, reason, found, counts["first"].get(reason, "-"))
                for reason, found in counts[kind].items()
                if found
            ]
    shown = [
        table(("split", "source", "format", "rows", "pairs", "dropped"), sources),
        columns(
            heading("Tokens, truncated")
            + table(("split", "part", "p50", "p90", "p99", "max"), lengths)
            + paragraph(f"max_length: {report['max_length_reason']}"),
            heading("Dropped and noted rows")
            + table(("split", "what", "reason", "rows", "first"), notes)
            if notes
            else "",
        ),
        *(paragraph(f"Hint: {hint}") for hint in report.get("hints", [])),
    ]
    return "".join(shown)


def _counts(source: dict[str, Any], kind: str) -> str:
    found = [f"{count:,} {reason}" for reason, count in source[kind].items() if count]
    return ", ".join(found) or "-"


def _committed(paths: RunDir) -> list[Path]:
    """Committed checkpoints by step, oldest first; their content is not looked at."""
    found = [
        path
        for path in (paths.checkpoints_dir.glob("*") if paths.checkpoints_dir.is_dir() else ())
        if step_of(path) is not None and (path / COMMIT_NAME).is_file()
    ]
    return sorted(found, key=lambda path: step_of(path) or 0)


def _newest_state(paths: RunDir) -> TrainState | None:
    for step_dir in reversed(_committed(paths)):
        try:
            return read_train_state(step_dir)
        except CheckpointError:
            continue
    return None


def _checkpoints(paths: RunDir, status: dict[str, Any]) -> str:
    found = _committed(paths)
    if not found:
        return paragraph("None has been committed yet.")
    best = status.get("best_checkpoint")
    rows = []
    for path in found:
        mib = sum(file.stat().st_size for file in path.glob("*")) / 2**20
        rows.append((path.name, step_of(path), mib, "best" if str(path) == best else ""))
    body = table(("folder", "step", "MiB", ""), rows)
    if best:
        body += paragraph(f"Best by {status['best_by']}: {number(status['best_metric'])}.")
    return body


def _export(verified: dict[str, Any]) -> str:
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


def _settings(paths: RunDir) -> str:
    if not paths.config_path.is_file():
        return paragraph(f"There is no {paths.config_path.name} yet.")
    rows = flatten(yaml.safe_load(paths.config_path.read_text(encoding="utf-8")))
    half = (len(rows) + 1) // 2
    return columns(*(table(("key", "value"), part) for part in (rows[:half], rows[half:])))


def _environment(status: dict[str, Any], state: TrainState | None, doctor: dict[str, Any]) -> str:
    software = [("dpo-dist", __version__), *(state.versions.items() if state else ())]
    place: list[tuple[str, Any]] = [("host of rank 0", status.get("host", "-"))]
    if state:
        place += [("ranks in training", state.world_size), ("ZeRO stage", state.zero_stage)]
    place.append(("restarts", status.get("restarts", {}).get("total", 0)))
    for rank, seen in enumerate(doctor.get("ranks", [])):
        gpus = ", ".join(f"{gpu['name']} ({gpu['gib']} GiB)" for gpu in seen["gpus"]) or "no GPU"
        place.append((f"rank {rank}: {seen['host']}", f"{seen['cores']} cores, {gpus}"))
    return columns(
        heading("Software") + table(("package", "version"), software),
        heading("Machines") + table(("what", "value"), [(k, str(v)) for k, v in place]),
    )
