"""What commands print: results as JSON on standard output, errors on standard error."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from dpo_dist.errors import DPODistError
from dpo_dist.run.logs import console


def read_result(path: Path) -> Any:
    """The JSON file that a stage or a command has written."""
    return json.loads(path.read_text())


def print_json(value: Any) -> None:
    """Prints for programs; other scripts than Latin stay readable."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(error: DPODistError) -> None:
    """Prints one message, unwrapped, so that it can be searched for."""
    console.print(
        f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
    )


def leave(code: int) -> NoReturn:
    """Ends the process at once.

    Libraries sometimes abort in their exit handlers, after the work; a rank that failed must not
    wait in one for the others; and taking apart half a million objects takes 2 s.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a pipe whose reader is gone
            stream.flush()
    os._exit(code)
