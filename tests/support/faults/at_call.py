"""A command as one rank of a job that meets a fault (`dpo_dist/watch/fault.py`)."""

import os
from collections.abc import Callable
from typing import Any

from support.commands import as_command

from dpo_dist.watch.fault import VARIABLE


def struck(fault: str, *arguments: str) -> None:
    """Runs a command under a fault; none if it is empty."""
    os.environ[VARIABLE] = fault
    as_command(*arguments)


def with_pairs_noted(note: Callable[[int, list[int]], None], fault: str, *arguments: str) -> None:
    """As `struck`; `note` gets every step with the pairs that this rank trains on in it."""
    from dpo_dist.training.job import Job

    planned = Job.micro_batches

    def micro_batches(job: Any, step: int) -> Any:
        batches = planned(job, step)
        note(step, [int(i) for batch in batches if batch.counted for i in batch.pair_indices])
        return batches

    Job.micro_batches = micro_batches
    struck(fault, *arguments)
