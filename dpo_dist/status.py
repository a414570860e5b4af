"""status.json: what a run is doing, for scripts and schedulers."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dpo_dist.manifest import write_json


def read_status(path: Path) -> dict[str, Any]:
    """The last status, or an empty one when there is none yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def update_status(path: Path, **fields: Any) -> None:
    """Merges fields into status.json with the time and the process that wrote it.

    `state` is running, finished, stopped (by a signal: start it again) or failed.
    """
    own = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    write_json(path, read_status(path) | fields | own)
