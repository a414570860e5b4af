"""A fault at a precise point of one rank, so that tests can see what a run survives.

    DPO_DIST_FAULT='kill@train.step=3,rank=1'
    DPO_DIST_FAULT='usr2@train.step=4;term@engine.checkpoints.commit:commit=1,rank=0,once=/tmp/done'

The action happens as the process enters the function for the N-th time: on every rank or on one,
and with `once` only to the first that can create that file, so that a restart meets it no more.
Nothing is added to the code that is struck; refused outside pytest.
"""

import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.errors import ConfigError

VARIABLE = "DPO_DIST_FAULT"
ACTIONS = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM,
    "usr2": signal.SIGUSR2, "raise": None,
}  # fmt: skip
POINTS = {  # what has a name; anything else is `module:function` of this package
    "reference.part": "reference.store:ReferenceStore.append",
    "train.step": "engine.sharding.zero:update",  # behind the backward
    "train.commit": "engine.checkpoints.commit:commit",
}
_SPEC = re.compile(
    r"(?P<action>\w+)@(?P<point>[\w.]+(?::[\w.]+)?)=(?P<call>\d+)"
    r"(?:,rank=(?P<rank>\d+))?(?:,once=(?P<once>[^,;]+))?"
)


class InjectedFaultError(Exception):
    """What `raise@...` raises."""


@dataclass(frozen=True)
class Fault:
    """One action, at the `call`-th entry of the function `where` (`module:qualified name`)."""

    action: str
    where: str
    call: int
    rank: int | None  # None: every rank
    once: Path | None

    def strike(self) -> None:
        """Does it to this process."""
        if self.once is not None:
            try:
                self.once.touch(exist_ok=False)
            except FileExistsError:
                return
        number = ACTIONS[self.action]
        if number is None:
            raise InjectedFaultError(f"at call {self.call} of {self.where}")
        os.kill(os.getpid(), number)


def parse(text: str) -> list[Fault]:
    """The faults that VARIABLE asks for; raises ConfigError for one that cannot be."""
    faults = []
    for one in text.split(";"):
        found = _SPEC.fullmatch(one)
        point = found and POINTS.get(found["point"], found["point"])
        if not found or not point or found["action"] not in ACTIONS or ":" not in point:
            raise ConfigError(
                f"{VARIABLE}: {one!r}",
                f"ACTION@POINT=N[,rank=R][,once=FILE] with an action of {' '.join(ACTIONS)}, and "
                f"{' '.join(POINTS)} or module:function",
                "Correct it.",
            )
        rank, once = found["rank"], found["once"]
        faults.append(
            Fault(
                found["action"], f"dpo_dist.{point}", int(found["call"]),
                None if rank is None else int(rank), None if once is None else Path(once),
            )
        )  # fmt: skip
    return faults


def arm(rank: int) -> None:
    """Watches the calls of this thread from now on, where the environment asks for a fault."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    if "PYTEST_CURRENT_TEST" not in os.environ:
        raise ConfigError(f"{VARIABLE}={asked}", "it in tests only", f"Unset {VARIABLE}.")
    faults = {(f.where, f.call): f for f in parse(asked) if f.rank in (None, rank)}
    watched, calls = {where for where, _ in faults}, Counter[str]()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        where = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"
        if where in watched:
            calls[where] += 1
            if fault := faults.get((where, calls[where])):
                fault.strike()

    if faults:
        sys.setprofile(watch)
