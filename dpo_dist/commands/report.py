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

from dpo_dist import __version__
from dpo_dist.engine.checkpoints.retention import marked
from dpo_dist.errors import ArtifactError
from dpo_dist.metrics.curves import HELD_OUT, Line, displacement, points
from dpo_dist.metrics.writer import read_lines
from dpo_dist.report import sections as report_sections
from dpo_dist.report.data_section import html_sections
from dpo_dist.report.page import Section, number, page
from dpo_dist.run.manifest import atomic_dir
from dpo_dist.run.run_dir import PAIRS_REPORT_NAME, REPORT_PAGE_NAME, TRAIN_STATE_NAME, RunDir
from dpo_dist.run.status import duration, read_status


def run(run_dir: Path) -> Path:
    """Writes the report of a run folder and returns its page.

    Raises ArtifactError when the folder is no run's, or when the report cannot be written; an
    older report then stays as it was.
    """
    paths = RunDir(run_dir)
    if not paths.status_path.is_file():
        raise ArtifactError(
            f"{paths.status_path} does not exist",
            "the folder of a run",
            "Name the run.dir of a run.yaml.",
        )
    try:
        with atomic_dir(paths.report_dir) as folder:
            (folder / REPORT_PAGE_NAME).write_text(_page(paths, folder), encoding="utf-8")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise ArtifactError(
            f"{paths.report_dir} could not be written ({error.strerror or error}{where})",
            "a writable folder with free space",
            "Fix this and run `dpo-dist report` again; nothing half-written is left.",
        ) from error
    return paths.report_dir / REPORT_PAGE_NAME


def _page(paths: RunDir, folder: Path) -> str:
    """The page; draws its pictures into the folder."""
    lines, status = read_lines(paths.metrics_path), read_status(paths.status_path)
    report = _read_json(paths.pairs_dir / PAIRS_REPORT_NAME)
    verified = _read_json(paths.verify_path)
    committed = marked(paths.checkpoints_dir)
    state = _read_json(committed[0] / TRAIN_STATE_NAME) if committed else {}
    evaluated, doctor = _read_json(paths.evaluate_path), _read_json(paths.doctor_path)
    answers = _read_json(paths.generate_path).get("answers", [])
    sampled = read_lines(paths.samples_path)
    # the warnings of the data stand at the top of this page
    data_shown = html_sections(report | {"warnings": []}) if report else ""
    sections = [
        Section("Curves", report_sections.curves(lines, folder)),
        Section("Held-out pairs", report_sections.held_out(lines, evaluated)),
        Section("Samples", report_sections.samples(answers, sampled)),
        Section("Data", report_sections.data(report, data_shown)),
        Section("Checkpoints", report_sections.checkpoints(committed[::-1], status)),
        Section("Export", report_sections.export(verified)),
        Section("Settings", report_sections.settings(paths.config_path)),
        Section("Environment", report_sections.environment(status, state, doctor)),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return page(
        paths.root.resolve().name,
        f"dpo-dist {__version__}, report of {written}",
        _facts(lines, status),
        [*_warnings(lines, status, verified), *report.get("warnings", [])],
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
        yield "in training steps", duration(_seconds_trained(lines))
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
