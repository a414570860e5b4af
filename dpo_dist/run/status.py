"""status.json: what a run is doing, for scripts and schedulers."""

import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_dist.run.manifest import write_json

SHORT_S = 60.0  # nobody is told of a shorter silence
SILENT_STAGE_S = 1800.0  # loading, evaluating or writing a large model says nothing for so long
POLL_S = 0.2  # between two looks at what another process does: its end, its file, its lock


def read_status(path: Path) -> dict[str, Any]:
    """The last status, or an empty one when there is none yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def update_status(path: Path, **fields: Any) -> None:
    """Merges fields into status.json with the time and the process that wrote it.

    `stages` holds what became of each stage, `progress` what was committed last: restarts are
    counted by it.
    """
    own = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    write_json(path, read_status(path) | fields | own)


def update_stage(path: Path, stage: str, state: str, **fields: Any) -> None:
    """Notes the state of a stage: started, running, finished, stopped (by a signal: start it
    again) or failed, with the error, the exit code and whether a restart may help."""
    stages = read_status(path).get("stages", {}) | {stage: {"state": state} | fields}
    update_status(path, stage=stage, state=state, stages=stages, pace=None)


def age_of(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system where this user may write.

    Clocks of hosts differ; the writer's and this one's are never compared unless this fails.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent) as fresh:
            now = os.fstat(fresh.fileno()).st_mtime
    except OSError:
        now = time.time()
    return max(0.0, now - path.stat().st_mtime)


def longest_silence(status: dict[str, Any]) -> float:
    """Seconds without a word after which a running stage is told to be silent: ten times its pace,
    the seconds between two words of training, and half an hour where there is none yet."""
    pace: float | None = status.get("pace")
    return max(SHORT_S, 10 * pace) if pace else SILENT_STAGE_S


def describe_status(status: dict[str, Any], age: float | None = None) -> list[tuple[str, str]]:
    """(name, value) lines for a person; `age` is the seconds since the last word, from `age_of`."""
    if age is None:
        age = time.time() - float(status["time"])
    state = status.get("state", "")
    lines = [
        ("stage", f"{status.get('stage', '-')} {state}"),
        ("updated", f"{age:,.0f} s ago on {status['host']} (pid {status['pid']})"),
    ]
    limit = longest_silence(status)
    if state in ("started", "running") and age > limit:
        lines.append(("silent", f"no word for {age:,.0f} s, expected one within {limit:,.0f} s"))
    train = status.get("train")
    if train:
        steps_left = 0 if status.get("early_stop") else train["num_steps"] - train["step"]
        lines += [
            ("step", f"{train['step']} of {train['num_steps']}"),
            ("loss", f"{train['loss']:.4f}"),
            ("margin", f"{train['rewards/margins']:.4f}"),
            ("accuracy", f"{train['rewards/accuracies']:.3f}"),
            ("pairs/s", f"{train['pairs_per_second']:.2f}"),
            ("time left", duration(steps_left * train["seconds_per_step"])),
        ]
    reference = status.get("reference")
    if reference:
        scored, missing = reference["num_scored"], reference["num_missing"]
        value = f"{scored:,} of {missing:,} new pairs scored"
        if scored < missing:
            speed = reference["pairs_per_second"]
            value += f", {speed:.2f} pairs/s, {duration((missing - scored) / speed)} left"
        lines.append(("reference", value))
    if "last_checkpoint" in status:
        lines.append(("last checkpoint", status["last_checkpoint"]))
    if status.get("best_checkpoint"):
        held_out = f"{status['best_by']} {status['best_metric']:.4f}"
        lines.append(("best checkpoint", f"{status['best_checkpoint']} ({held_out})"))
    if status.get("skipped_steps"):
        lines.append(("skipped steps", ", ".join(map(str, status["skipped_steps"]))))
    if status.get("early_stop"):
        lines.append(("ended", status["early_stop"]))
    restarts = status.get("restarts", {})
    lines.append(("restarts", str(restarts.get("total", 0))))
    own = status.get("stages", {}).get(status.get("stage"), {})
    if own.get("error"):
        lines.append(("error", str(own["error"])))
    return lines


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, for a person."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
