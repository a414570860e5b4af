"""status.json: what a run is doing, for scripts and schedulers."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from dpo_dist.parsing import parse_as, parse_json
from dpo_dist.run.manifest import write_json
from dpo_dist.watch.lease import age_of

UNKNOWN_S = 1800.0  # that a stage may take without a word whose limit is not known


# What is read of status.json, which holds more.
class _Stage(BaseModel):
    state: str = ""
    error: str | None = None
    exit_code: int = 1
    restartable: bool = True


class _Late(BaseModel):
    rank: int
    host: str
    section: str


class _Restarts(BaseModel):
    total: int
    without_progress: int
    progress: Any


class _Reference(BaseModel):
    num_scored: int
    num_missing: int
    pairs_per_second: float


class _Train(BaseModel):
    step: int
    num_steps: int
    loss: float
    margins: float = Field(alias="rewards/margins")
    accuracies: float = Field(alias="rewards/accuracies")
    pairs_per_second: float
    seconds_per_step: float


class _Status(BaseModel):
    time: float
    host: str
    pid: int
    stage: str = ""
    state: str = ""
    stages: dict[str, _Stage] = {}
    restarts: _Restarts | None = None
    train: _Train | None = None
    reference: _Reference | None = None
    last_checkpoint: str = ""
    best_checkpoint: str | None = None
    best_by: str | None = None
    best_metric: float | None = None
    skipped_steps: list[int] = []
    early_stop: str | None = None
    late: list[_Late] = []


class _Heartbeat(BaseModel):
    limit: float | None


def read_status(path: Path) -> dict[str, Any]:
    """The last status; an empty one when there is none yet, or none that was written here."""
    try:
        text = path.read_bytes()
        parse_as(_Status, text)
        return parse_json(text)
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
    update_status(path, stage=stage, state=state, stages=stages)


def last_word(status_path: Path, heartbeat_path: Path) -> tuple[float, float | None]:
    """(seconds since a run last said something, those that its section may take by `watchdog:`)."""
    age = age_of(status_path)
    try:
        limit = parse_as(_Heartbeat, heartbeat_path.read_bytes()).limit
        return min(age, age_of(heartbeat_path)), limit
    except (OSError, ValueError):
        return age, UNKNOWN_S


def is_overdue(status: dict[str, Any], age: float, limit: float | None) -> bool:
    """Whether a stage that should be running has said nothing for longer than it may."""
    return status.get("state") in ("started", "running") and limit is not None and age > limit


def describe_status(
    status: dict[str, Any], age: float | None = None, limit: float | None = None
) -> list[tuple[str, str]]:
    """(name, value) lines for a person; `age` and `limit` are from `last_word`."""
    if age is None:
        age = time.time() - float(status["time"])
    state = status.get("state", "")
    lines = [
        ("stage", f"{status.get('stage', '-')} {state}"),
        ("updated", f"{age:,.0f} s ago on {status['host']} (pid {status['pid']})"),
    ]
    if limit is not None and is_overdue(status, age, limit):
        lines.append(("silent", f"no word for {age:,.0f} s (limit {limit:,.0f} s)"))
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
        speed = reference["pairs_per_second"]
        if scored < missing and speed > 0:
            value += f", {speed:.2f} pairs/s, {duration((missing - scored) / speed)} left"
        lines.append(("reference", value))
    if "last_checkpoint" in status:
        lines.append(("last checkpoint", status["last_checkpoint"]))
    if status.get("best_checkpoint") and status.get("best_metric") is not None:
        held_out = f"{status.get('best_by')} {status['best_metric']:.4f}"
        lines.append(("best checkpoint", f"{status['best_checkpoint']} ({held_out})"))
    if status.get("skipped_steps"):
        lines.append(("skipped steps", ", ".join(map(str, status["skipped_steps"]))))
    if status.get("early_stop"):
        lines.append(("ended", status["early_stop"]))
    restarts = status.get("restarts", {})
    lines.append(("restarts", str(restarts.get("total", 0))))
    if status.get("late"):
        late = [f"rank {r['rank']} on {r['host']} in {r['section']}" for r in status["late"]]
        lines.append(("last hang", ", ".join(late)))
    own = status.get("stages", {}).get(status.get("stage"), {})
    if own.get("error"):
        lines.append(("error", str(own["error"])))
    return lines


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, for a person."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
