"""Signs of progress: which section this process is in, and how often it has got further.

    with during("checkpoint"):
        for tensor in tensors:
            write(tensor)
            beat()

A sign is a few numbers in memory. The watchdog looks at them once a second, from its own thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the forward alone needs no config
    from dpo_dist.config.watchdog_section import WatchdogSection

# The keys of `watchdog:`, and one without a limit: what waits for the Hub has its client's own.
SectionName = Literal[
    "load", "self_check", "reference", "step", "evaluation", "checkpoint", "export", "verify",
    "prepare", "generate", "network",
]  # fmt: skip
SLOWER = 10  # than the longest wait of a section so far: a rank that is only slow is left alone
LONGEST_S = 1800.0  # where that ends: a collective waits no longer either


class _Heart:
    def __init__(self) -> None:
        self.beats, self.section = 0, "load"
        self.last = time.monotonic()
        self.longest: dict[str, float] = {}  # seconds between two beats, by section


_heart = _Heart()


def beat() -> None:
    """Says that this process got further; any thread may."""
    now = time.monotonic()
    gap = now - _heart.last
    if gap > _heart.longest.get(_heart.section, 0.0):
        _heart.longest[_heart.section] = gap
    _heart.last = now
    _heart.beats += 1


@contextlib.contextmanager
def during(name: SectionName) -> Iterator[None]:
    """What this process is doing inside the block; main thread only."""
    before = _heart.section
    beat()
    _heart.section = name
    try:
        yield
    finally:
        beat()
        _heart.section = before


def signs() -> tuple[int, str]:
    """(beats so far, section)."""
    return _heart.beats, _heart.section


def limit_of(name: str, settings: WatchdogSection) -> float | None:
    """Seconds that a section may take for one beat, None without a limit.

    That of the settings, or ten times the longest seen in it where that is more.
    """
    limit: float | None = getattr(settings, name, None)
    if not limit:
        return None
    return max(limit, min(SLOWER * _heart.longest.get(name, 0.0), LONGEST_S))
