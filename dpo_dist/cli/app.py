"""dpo-dist STAGE run.yaml [section.key=value ...]: the command line, without torch at start."""

from typing import Annotated

import typer

from dpo_dist import __version__
from dpo_dist.cli import evaluating, running, show
from dpo_dist.cli.importing import import_config, import_trl
from dpo_dist.cli.output import leave, print_error
from dpo_dist.cli.sweep import sweep
from dpo_dist.errors import EXIT_RESTART, DPODistError, as_disk_error

COMMANDS = (  # in the order of --help
    running.run, sweep,
    running.prepare, running.reference, running.train, running.export, running.verify, running.push,
    evaluating.evaluate, evaluating.generate, evaluating.judge,
    show.doctor, show.status, show.report, show.plan, show.config, import_trl,
)  # fmt: skip

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Multi-node DPO: prepare, reference, train, export, verify.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for _command in COMMANDS:
    app.command()(_command)
app.command("import")(import_config)  # a word of Python's own


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        # eager: answered before a missing command is complained about
        typer.Option("--version", callback=_print_version, is_eager=True, help="The version."),
    ] = False,
) -> None:
    pass


def command() -> int:
    """Runs the command of sys.argv; its exit code.

    An error of the user is one message and exit code 2, never a traceback.
    """
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except DPODistError as error:
        print_error(error)
        return EXIT_RESTART if error.transient else error.exit_code
    except (OSError, BaseExceptionGroup) as error:
        disk = as_disk_error(error)
        if disk is None:
            raise
        print_error(disk)
        return EXIT_RESTART if disk.transient else disk.exit_code
    return 0


def main() -> None:
    """Entry point: as `command`, and ends the process."""
    leave(command())
