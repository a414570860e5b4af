"""Ends a stage that hangs: a thread in every rank, which looks once a second and never waits.

Rank 0 knows how far each rank is (peers.py) and decides for all; a process without peers, or that
never heard of rank 0, decides for itself. A stage hangs when

* nobody got further for as long as a section may take, or
* a rank says nothing at all, as when it is stopped; rank 0 is judged by the others.

Then every rank writes the stacks of its threads into its log, one says in status.json which rank is
late, and all leave with 75, on which launchers start the stage again. Time is counted in this
process's own seconds, so a job that was suspended as a whole goes on; clocks are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_dist.errors import EXIT_RESTART
from dpo_dist.watch.guardian import Guardian, start_guardian
from dpo_dist.watch.heartbeat import limit_of, signs
from dpo_dist.watch.peers import Line, Meeting, Pulse, Word
from dpo_dist.watch.verdict import Tell, Verdict, say_last

if TYPE_CHECKING:  # the forward alone needs no config
    from dpo_dist.config.watchdog_section import WatchdogSection

TICK_S = 1.0
RANKS_A_SECOND = 256  # that rank 0 listens to; more of them speak less often
STALE_TICKS = 5  # without a word: stopped, among ranks of which none gets further
LINGER_S = 3.0  # behind the last words: a rank that is gone ends the collectives of the others
SHOWN = 8  # late ranks in a message
COLLECTIVES = ("torch/distributed", "deepspeed/comm")


@dataclass
class _Seen:
    """A rank, as this process sees it; seconds are this process's own."""

    pulse: Pulse
    unheard: float = 0.0  # since its last word
    idle: float = 0.0  # since it got further


class Watchdog:
    """Of this process; the open file `log` and `tell` are where it says what it found."""

    def __init__(self, settings: WatchdogSection, rank: int, log: int, tell: Tell) -> None:
        self.settings, self.rank, self.log, self.tell = settings, rank, log, tell
        self.guardian: Guardian | None = None
        self.line: Line | None = None  # to the other ranks, while there is a group
        self.world_size = 1
        self.progress = 0  # grows while anybody gets further
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()  # of _seen and line, which two threads change

    @property
    def tick(self) -> float:
        """Seconds between two looks."""
        return max(TICK_S, self.world_size / RANKS_A_SECOND)

    def pulse(self) -> Pulse:
        """What this rank says of itself."""
        beats, section = signs()
        where, waits = place_of_main_thread()
        limit = limit_of(section, self.settings)
        return Pulse(self.rank, socket.gethostname(), section, beats, limit, where, waits)

    def watch(self) -> None:
        """The thread's work."""
        before, line = time.monotonic(), None
        while True:
            if line is not None and line is not self.line:
                line.close()
            line = self.line
            if line is None:
                time.sleep(TICK_S)
            words = [] if line is None else line.hear(self.tick)
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.tick), now
            if verdict := self.look(line, words, passed):
                self._leave(verdict, line)

    def look(self, line: Line | None, words: list[Word], passed: float) -> Verdict | None:
        """Takes in what was heard in `passed` seconds and answers; whether the stage hangs."""
        own = self.pulse()
        if self.guardian is not None:
            self.guardian.hear(own.section)
        for word in words:
            if word.verdict is not None:
                return Verdict(**word.verdict)
        with self._lock:
            follows = line is not None and line is self.line and self.rank > 0
            self._take([own, *(word.pulse for word in words)], passed)
            if follows and any(word.pulse.left for word in words):
                self.line, self._seen = None, {}  # rank 0 is done
                return None
            if line is not None and line is self.line:
                line.say(Word(own))
            if follows and 0 in self._seen:
                return self._silent([self._seen[0]])
            return self._silent(list(self._seen.values())) or self._idle()

    def join(self, line: Line, world_size: int, heard: list[Word]) -> None:
        """Watches the ranks at the other ends of `line` as well, of which some were heard."""
        with self._lock:
            self.line, self.world_size, self._seen = line, world_size, {}
            self._take([word.pulse for word in heard], 0.0)

    def part(self, line: Line) -> None:
        """Watches this process alone, and tells the others so."""
        with self._lock:
            line.say_last(Word(replace(self.pulse(), left=True)))
            self.line, self.world_size, self._seen = None, 1, {}

    def _take(self, pulses: list[Pulse], passed: float) -> None:
        for seen in self._seen.values():
            seen.unheard += passed
            seen.idle += passed
        for pulse in pulses:
            before = self._seen.pop(pulse.rank, None)
            if pulse.left:
                continue
            if before is None or before.pulse.beats != pulse.beats:
                self.progress += 1
                self._seen[pulse.rank] = _Seen(pulse)
            else:
                self._seen[pulse.rank] = _Seen(pulse, idle=before.idle)

    def _silent(self, ranks: list[_Seen]) -> Verdict | None:
        limit = self.settings.silent
        late = [seen for seen in ranks if limit and seen.unheard >= limit]
        if not late or limit is None:
            return None
        self._place(late)
        found = f"{_named(late)}: no word for {late[0].unheard:,.0f} s"
        expected = f"one every {self.tick:.3g} s, within {limit:,.0f} s"
        return Verdict(found, expected, "silent", _listed(late))

    def _idle(self) -> Verdict | None:
        ranks = list(self._seen.values())
        limits = [seen.pulse.limit for seen in ranks if seen.pulse.limit is not None]
        idle = min(seen.idle for seen in ranks)
        if len(limits) < len(ranks) or idle < max(limits):
            return None
        stopped = [seen for seen in ranks if seen.unheard > STALE_TICKS * self.tick]
        self._place(stopped)
        late = stopped or [seen for seen in ranks if not seen.pulse.waits] or ranks
        found = f"{_named(late)}: no rank got further for {idle:,.0f} s"
        expected = f"some progress within {max(limits):,.0f} s"
        return Verdict(found, expected, late[0].pulse.section, _listed(late))

    def _place(self, stopped: list[_Seen]) -> None:
        """Says of ranks whose last word is older than their stop where the others wait for them."""
        if (own := self.pulse()).waits:
            for seen in stopped:
                seen.pulse = replace(seen.pulse, section=own.section)

    def _leave(self, verdict: Verdict, line: Line | None) -> None:
        """Says why and ends this process, whatever its main thread waits for."""
        if line is not None and self.rank == 0:
            line.say_last(Word(self.pulse(), asdict(verdict)))
        late = {rank["rank"] for rank in verdict.late}
        teller = next((rank for rank in range(self.world_size) if rank not in late), 0)
        say_last(verdict, self.log, self.tell if self.rank == teller else None)
        if line is not None:
            time.sleep(LINGER_S)
        os._exit(EXIT_RESTART)


_watchdog: Watchdog | None = None  # of this process


def start(
    settings: WatchdogSection, rank: int, world_size: int, *, log: int, note_path: Path | None,
    tell: Tell,
) -> None:  # fmt: skip
    """Watches this process from now on; `note_path` is what `dpo-dist status` reads, if any.

    `log` is an open file for stacks. Call it before there are threads.
    """
    global _watchdog
    _watchdog = dog = Watchdog(settings, rank, log, tell)
    if world_size == 1 and settings.silent:
        dog.guardian = start_guardian(settings.silent, log, tell)
    threading.Thread(target=dog.watch, name="watchdog", daemon=True).start()
    if note_path is not None:
        # apart: it writes files, which may take for ever
        threading.Thread(target=_write_notes, args=(dog, note_path), daemon=True).start()


@contextlib.contextmanager
def group_watched(
    rank: int, world_size: int, host: str, broadcast: Callable[[Meeting | None], Any]
) -> Iterator[None]:
    """The ranks of a group, of which 0 is on `host`, watch each other inside the block."""
    dog = _watchdog
    if dog is None or world_size == 1:
        yield
        return
    line = Line(rank, host)
    line.meet(broadcast(line.meeting if rank == 0 else None))
    dog.join(line, world_size, line.greet(dog.pulse(), world_size))
    try:
        yield
    finally:
        dog.part(line)


def place_of_main_thread() -> tuple[str, bool]:
    """(`file:line function` of this package where it is, whether it waits in a collective)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and any(n in frame.f_code.co_filename for n in COLLECTIVES)
    while frame is not None and "dpo_dist" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "-", waits
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}", waits


def _write_notes(dog: Watchdog, path: Path) -> None:
    """Writes a small file, at most once a second and only while a rank gets further."""
    told, draft = -1, path.with_name(f".{path.name}.{os.getpid()}")
    while True:
        if (progress := dog.progress) != told:
            pulse, told = dog.pulse(), progress
            with contextlib.suppress(OSError):  # the next one may come through
                draft.write_text(json.dumps({"section": pulse.section, "limit": pulse.limit}))
                draft.replace(path)
        time.sleep(TICK_S)


def _named(late: list[_Seen]) -> str:
    shown = [
        f"rank {seen.pulse.rank} on {seen.pulse.host} in {seen.pulse.section} "
        f"(last at {seen.pulse.where})"
        for seen in late[:SHOWN]
    ]
    return ", ".join(shown) + (f" and {len(late) - SHOWN} more" if len(late) > SHOWN else "")


def _listed(late: list[_Seen]) -> list[dict[str, Any]]:
    return [
        {"rank": seen.pulse.rank, "host": seen.pulse.host, "section": seen.pulse.section}
        for seen in late
    ]
