"""What both kinds of cluster test need: a run to interrupt, and a look at where it stands."""

import json
import shutil
from pathlib import Path
from typing import Any

LONG = ("train.num_epochs=32", "checkpoint.every_steps=20", "eval.every_steps=40")
LAST_STEP = 160


def scored_copy(local: Path, out: Path) -> Path:
    """A run folder with pairs and reference done."""
    for name in ("pairs", "reference"):
        shutil.copytree(local / "out" / name, out / name)
    return out


def status_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def step_of(run_dir: Path) -> int:
    return status_of(run_dir).get("train", {}).get("step", 0)
