"""Something that happens to one rank of a command as it enters a function for the n-th time."""

import os
import sys
from collections.abc import Callable
from typing import Any

from support.tiny_run import as_command

from dpo_dist.run.topology import from_environment

Strike = tuple[int, str, int, int]  # rank, "module:function", which call, the signal; 0: an error


class StrikeError(Exception):
    """What is raised instead of a signal."""


def struck(strikes: list[Strike], *arguments: str) -> None:
    """Runs a command as one rank of a job that meets its strikes, each at most once."""
    own = from_environment().rank
    at_calls({(where, call): number for rank, where, call, number in strikes if rank == own})
    as_command(*arguments)


def at_calls(strikes: dict[tuple[str, int], int]) -> None:
    """Watches every call of the main thread from now on, for `(module:function, which call)`."""
    calls = dict.fromkeys((where for where, _ in strikes), 0)

    def watch(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        where = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"
        if where in calls:
            calls[where] += 1
            number = strikes.get((where, calls[where]))
            if number:
                os.kill(os.getpid(), number)
            elif number == 0:
                sys.setprofile(None)
                raise StrikeError(f"at call {calls[where]} of {where}")

    if strikes:
        sys.setprofile(watch)


def with_pairs_noted(
    note: Callable[[int, list[int]], None], strikes: list[Strike], *arguments: str
) -> None:
    """As `struck`; `note` gets every step with the pairs that this rank trains on in it."""
    from dpo_dist.training.job import Job

    planned = Job.micro_batches

    def micro_batches(job: Any, step: int) -> Any:
        batches = planned(job, step)
        note(step, [int(i) for batch in batches if batch.counted for i in batch.pair_indices])
        return batches

    Job.micro_batches = micro_batches
    struck(strikes, *arguments)
