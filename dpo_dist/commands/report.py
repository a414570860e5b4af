"""A run as one HTML page with its plots: `report/index.html`, at any point of the run.

1. Read what the stages have left in the run folder so far; nothing else is needed.
2. Draw the curves into the page, and as PNG files beside it.
3. The folder appears under its name only when it is whole.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist import __version__
from dpo_dist.engine.checkpoints.retention import marked
from dpo_dist.errors import ArtifactError
from dpo_dist.metrics.curves import HELD_OUT, PLOTS, Line, displacement, points
from dpo_dist.metrics.writer import read_lines
from dpo_dist.parsing import parse_json, parse_yaml
from dpo_dist.report import data_section
from dpo_dist.report import sections as parts
from dpo_dist.report.charts import write_pictures
from dpo_dist.report.page import Html, Page, Section, number
from dpo_dist.run.manifest import atomic_dir
from dpo_dist.run.run_dir import PAIRS_REPORT_NAME, REPORT_PAGE_NAME, TRAIN_STATE_NAME, RunDir
from dpo_dist.run.status import duration


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
            lines = read_lines(paths.metrics_path)
            write_pictures(lines, PLOTS, folder)
            (folder / REPORT_PAGE_NAME).write_text(_page(paths, lines), encoding="utf-8")
    except OSError as error:
        known = error.filename in (None, str(paths.report_dir))
        where = "" if known else f": {error.filename}"
        raise ArtifactError(
            f"{paths.report_dir} could not be written ({error.strerror or error}{where})",
            "a writable folder with free space",
            "Fix this and run `dpo-dist report` again; nothing half-written is left.",
        ) from error
    return paths.report_dir / REPORT_PAGE_NAME


@dataclass(frozen=True)
class _Files:
    """What the files of a run hold; those that cannot be read are noted in `damaged`."""

    root: Path
    damaged: list[str] = field(default_factory=list)

    def read(self, path: Path, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
        """The mapping in a file, {} when it is not there yet or damaged."""
        try:
            found = parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        self.damaged.append(str(path.relative_to(self.root)))
        return {}


def _page(paths: RunDir, lines: Sequence[Line]) -> Html:
    files = _Files(paths.root)
    status, doctor = files.read(paths.status_path), files.read(paths.doctor_path)
    evaluated, verified = files.read(paths.evaluate_path), files.read(paths.verify_path)
    answers = files.read(paths.generate_path).get("answers", [])
    data = files.read(paths.pairs_dir / PAIRS_REPORT_NAME)
    config = files.read(paths.config_path, parse_yaml)
    committed = marked(paths.checkpoints_dir)
    state = files.read(committed[0] / TRAIN_STATE_NAME) if committed else {}
    sections = {  # title: its blocks, and what is said without any
        "Curves": (parts.curves(lines), "No step has been trained yet."),
        "Held-out pairs": (
            parts.held_out(lines, evaluated),
            "No held-out pairs have been evaluated yet.",
        ),
        "Samples": (
            parts.samples(answers, read_lines(paths.samples_path)),
            "None yet: run `dpo-dist generate`, or set eval.samples_every_steps before training.",
        ),
        "Data": (data_section.blocks(data), "No pairs have been prepared yet."),
        "Checkpoints": (
            parts.checkpoints(committed[::-1], status),
            "None has been committed yet.",
        ),
        "Export": (parts.export(verified), "Nothing has been exported and verified yet."),
        "Settings": (parts.settings(config), f"There is no {paths.config_path.name} yet."),
        "Environment": (parts.environment(status, state, doctor), ""),
    }
    warnings = [
        *(f"{name} is damaged: not shown." for name in files.damaged),
        *_warnings(lines, status, verified),
        *data.get("warnings", []),
    ]
    return Page(
        paths.root.resolve().name,
        f"dpo-dist {__version__}, report of {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
        dict(_figures(lines, status)),
        warnings,
        [Section(title, *found) for title, found in sections.items()],
    ).html()


def _last(lines: Sequence[Line], name: str) -> Any:
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _figures(lines: Sequence[Line], status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures at the top of the page."""
    yield "last stage", f"{status.get('stage', '-')} {status.get('state', '')}"
    train = status.get("train")
    if train:
        yield "optimizer steps", f"{train['step']:,} of {train['num_steps']:,}"
    for name, label in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        for prefix, where in ((HELD_OUT, "held-out"), ("", "training")):
            if (value := _last(lines, prefix + name)) is not None:
                yield f"{where} reward {label}, last", number(value)
                break
    if speeds := points(lines, "pairs_per_second")[1]:
        yield "pairs per second, median", number(statistics.median(speeds))
        yield "spent in training steps", duration(_seconds_trained(lines))
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
        share = f"{len(broken):,} of {len(lines):,} lines"
        yield f"Numbers that are not finite: {share}, first at step {broken[0]}."
    for stage, own in status.get("stages", {}).items():
        if own.get("state") == "failed":
            yield f"{stage} failed: {own.get('error')}"
    if verified.get("passed") is False:
        yield "The export was not verified: see Export."
