"""One thing that verify looked at, and what it said of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_dist.errors import DPODistError, VerificationError, is_transient

NUM_SHOWN = 3  # problems that a check names


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; numbers where two were compared."""

    name: str
    passed: bool
    detail: str
    max_difference: float | None = None
    tolerance: float | None = None


def check(name: str, look: Callable[[], str]) -> Check:
    """Runs a check that tells what it saw, or raises: whatever a broken folder makes of it.

    A file system that may be back says nothing of the folder: its error is raised.
    """
    try:
        return Check(name, True, look())
    except DPODistError as error:
        if error.transient:
            raise
        return Check(name, False, error.found)
    except Exception as error:
        if is_transient(error):
            raise
        return Check(name, False, repr(error))


def refuse(problems: Sequence[str]) -> None:
    """Raises VerificationError with the first few problems, if there are any."""
    if problems:
        more = f"; {len(problems)} in all" if len(problems) > NUM_SHOWN else ""
        raise VerificationError("; ".join(problems[:NUM_SHOWN]) + more, "none of this", "")
