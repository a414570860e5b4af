"""A small process beside one that has no peers: what is stopped cannot watch itself."""

import contextlib
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import NoReturn

from dpo_dist.watch.verdict import Tell, Verdict, say_last

TICK_S = 1.0
DUMP_S = 1.0  # for the stacks of a process that is woken for them
# Slurm sends these to every process of a step: they are for the one that is guarded.
IGNORED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Guardian:
    """The end of the pipe by which its process says that it runs."""

    pipe: int

    def hear(self, section: str) -> None:
        """Once a second; the guardian may be gone, and then nobody listens."""
        with contextlib.suppress(OSError):
            os.write(self.pipe, section.encode() + b"\n")


def start_guardian(silent: float, log: int, tell: Tell) -> Guardian:
    """Forks it, so call this before there are threads; it ends with this process.

    After `silent` seconds without a word it says so, lets the process write its stacks, and kills
    it. Seconds count only while it runs itself: a job that is suspended as a whole is left alone.
    """
    ours, theirs = os.pipe()
    guarded = os.getpid()
    if os.fork() == 0:
        os.close(theirs)
        try:
            _guard(ours, guarded, silent, log, tell)
        finally:
            os._exit(1)
    os.close(ours)
    os.set_blocking(theirs, False)
    return Guardian(theirs)


def _guard(pipe: int, guarded: int, silent: float, log: int, tell: Tell) -> NoReturn:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    unheard, section = 0.0, "load"
    while unheard < silent:
        began = time.monotonic()
        if not select.select([pipe], [], [], TICK_S)[0]:
            unheard += min(time.monotonic() - began, 2 * TICK_S)
            continue
        unheard, section = 0.0, _last_word(pipe)
    os.kill(guarded, signal.SIGQUIT)  # its handler writes the stacks
    os.kill(guarded, signal.SIGCONT)
    time.sleep(DUMP_S)
    if select.select([pipe], [], [], 0)[0]:
        section = _last_word(pipe)  # where it was stopped, a second after its last word
    host = socket.gethostname()
    verdict = Verdict(
        f"rank 0 on {host} in {section}: no word for {unheard:,.0f} s",
        f"one every {TICK_S:.3g} s, within {silent:,.0f} s",
        "silent",
        [{"rank": 0, "host": host, "section": section}],
    )
    say_last(verdict, log, tell)
    os.kill(guarded, signal.SIGKILL)
    os._exit(0)


def _last_word(pipe: int) -> str:
    words = os.read(pipe, 4096)
    if not words:
        os._exit(0)  # it has ended
    return words.split()[-1].decode()
