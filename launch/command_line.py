"""What the programs of this folder have in common on the command line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.errors import EXIT_RESTART, DPODistError, is_transient

ConfigPath = Annotated[Path, typer.Argument(help="The run config.", metavar="RUN.YAML")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value", metavar="[SECTION.KEY=VALUE]...")
]


def start(*commands: Callable[..., None]) -> None:
    """Runs the command that is asked for, or the only one.

    Unknown options and errors of the user are one message and exit code 2. Of an error that passes
    the exit code is 75.
    """
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    for command in commands:
        app.command()(command)
    try:
        app()
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_RESTART if error.transient else error.exit_code)
    except OSError as error:
        if not is_transient(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_RESTART)
