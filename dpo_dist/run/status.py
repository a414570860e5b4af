"""status.json: what a run is doing, for scripts and schedulers."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dpo_dist.run.manifest import write_json

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
    update_status(path, stage=stage, state=state, stages=stages)


def describe_status(status: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) lines for a person."""
    age = time.time() - status["time"]
    lines = [
        ("stage", f"{status.get('stage', '-')} {status.get('state', '')}"),
        ("updated", f"{age:,.0f} s ago on {status['host']} (pid {status['pid']})"),
    ]
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
