"""What commands print: results as JSON on standard output, errors on standard error."""

import json
from pathlib import Path
from typing import Any

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
