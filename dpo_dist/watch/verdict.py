"""That a stage hangs, and the last words of a process about it."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_dist.errors import ClusterError

SAYING_S = 10.0  # for the last words: the file system may be what hangs
Tell = Callable[[str, list[dict[str, Any]]], None]  # the error, and the late ranks


@dataclass(frozen=True)
class Verdict:
    """Which ranks are late (rank, host, section), and by which key of `watchdog:`."""

    found: str
    expected: str
    key: str
    late: list[dict[str, Any]]

    def error(self) -> ClusterError:
        return ClusterError(
            self.found,
            f"{self.expected} (watchdog.{self.key})",
            "The stacks are in the ranks' logs, and the launcher starts the stage again from what "
            "was committed. If it is always the same host, leave it out; if it was only slow, "
            f"raise watchdog.{self.key}.",
        )


def say_last(verdict: Verdict, log: int, tell: Tell | None) -> None:
    """Writes the error to the terminal, the stacks of all threads and the error to the open file
    `log`, and passes it to `tell`; returns in time even where a file system hangs."""
    error = str(verdict.error())
    line = f"error: {error}\n".encode()

    def say() -> None:
        if log != sys.stderr.fileno():
            os.write(sys.stderr.fileno(), line)  # not through a lock that another thread holds
        faulthandler.dump_traceback(log, all_threads=True)
        os.write(log, line)  # the end of a log is what launchers show
        if tell is not None:
            tell(error, verdict.late)

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(SAYING_S)
