"""Signals that ask a run to stop: the handler only sets a flag, the stages look at it."""

import signal
from types import FrameType

# USR2 is what a scheduler sends before preemption (NCCL may catch USR1).
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Set by the first of SIGNALS; later ones change nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> "StopFlag":
        """Handles SIGNALS from now on; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None


class Stopped(Exception):
    """A stage ended early because it was asked to, with everything committed."""
