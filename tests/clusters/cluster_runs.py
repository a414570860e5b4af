"""What both kinds of cluster test need: a run to interrupt, and a look at where it stands."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.ranks import wait_until

LONG = ("train.num_epochs=32", "checkpoint.every_steps=20", "eval.every_steps=40")
LAST_STEP = 160
SOAK = ("checkpoint.every_steps=5", "watchdog.silent=8")  # beside LONG: no number depends on them
SOAK_FAULTS, SOAK_EVERY = 10, 14  # steps from one to the next


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


def soak(out: Path, seed: int, faults: Sequence[Callable[[], None]]) -> list[str]:
    """Does SOAK_FAULTS of the faults to a training, each once it has got further; their names."""
    chance, done = random.Random(seed), []
    for number in range(SOAK_FAULTS):
        at = step_of(out) + SOAK_EVERY
        wait_until(lambda at=at: step_of(out) >= at, 180)
        fault = chance.choice(faults)
        fault()
        done.append(f"{fault.__name__} at step {at}")
        print(done[-1], flush=True)
        wait_until((out / "logs" / f"train-{number + 2:02d}").exists, 180)
    return done
