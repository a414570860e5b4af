"""A rank that hangs in a section: stopped by a signal, asleep, or in a file system that is dead."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

from support.commands import as_command

from dpo_dist.run.topology import from_environment
from dpo_dist.watch import heartbeat

Kind = Literal["stopped", "asleep", "dead file system"]


def hang_in(section: str, rank: int, kind: Kind, pipe: str, *arguments: str) -> None:
    """Runs a command as one rank of a job; `rank` hangs at its second sign of life in a section."""
    if from_environment().rank == rank:
        heartbeat._heart = _Hanging(section, kind, pipe)  # pyright: ignore[reportPrivateUsage]
    as_command(*arguments)


class _Hanging(heartbeat._Heart):  # pyright: ignore[reportPrivateUsage]
    def __init__(self, section: str, kind: Kind, pipe: str) -> None:
        super().__init__()
        self._where, self._kind, self._pipe = section, kind, pipe

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        mark = mark_of(Path(self._pipe)) if name == "beats" and value > 1 else None
        if mark is not None and self.section == self._where and not mark.exists():
            mark.touch()
            if self._kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self._kind == "asleep":
                time.sleep(600)
            else:
                Path(self._pipe).read_text()  # nobody writes into it


def mark_of(pipe: Path) -> Path:
    """Is there once the rank hangs."""
    return pipe.with_suffix(".hangs")


def late_of(status_path: Path) -> list[dict[str, Any]]:
    """Which ranks status.json names as late."""
    return json.loads(status_path.read_text()).get("late", [])
