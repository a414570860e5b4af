"""The command line as a user sees it, without importing torch anew for every process.

    done = dpo_dist("plan", run_yaml)             # as subprocess.run
    with started("train", run_yaml) as process:   # as subprocess.Popen
        process.send_signal(signal.SIGUSR2)

A command runs in a fork of the process behind `support.ranks`, which has imported what the stages
need; the ranks that it starts are forks of it in turn. All else is as in a shell: arguments,
environment, working directory, exit codes.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.ranks import ROOT, ForkedProcess, started_ranks

from dpo_dist.run.topology import VARIABLES

STREAMS = ("stdout", "stderr")
FIRST_OWN_FD, LAST_FD = 3, 4096


def dpo_dist(*arguments: str | Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; its ranks die with it."""
    with tempfile.TemporaryDirectory() as folder:
        words = list(map(str, arguments))
        with started_ranks(1, _command, folder, *words) as ranks:
            (result,) = ranks.wait(timeout_s)
        said = [Path(folder, name).read_text(errors="replace") for name in STREAMS]
    return subprocess.CompletedProcess(words, result.exit_code, *said)


def succeed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `dpo_dist`; fails with its output when the command does."""
    done = dpo_dist(*arguments)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[ForkedProcess]:
    """A command that runs on; killed with all that it has started at the end of the block."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started_ranks(1, _command, folder, *map(str, arguments)) as ranks,
    ):
        yield ranks.processes[0]


def as_command(*arguments: str) -> None:
    """The command line in this process, which it ends: a user's, or one rank's of a job."""
    from dpo_dist.cli.app import main

    sys.argv = ["dpo-dist", *arguments]
    main()


def as_user() -> None:
    """Makes this process one that a user has started from a shell, and its ranks forks of it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    for name in VARIABLES:
        os.environ.pop(name, None)
    subprocess.Popen = _Forking


def _command(folder: str, *arguments: str) -> None:
    for number, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.chdir(ROOT)
    as_user()
    as_command(*arguments)


class _Forking(subprocess.Popen):  # pyright: ignore
    """`python -m dpo_dist ...` goes on as a fork of this process; all else is really started."""

    def __init__(self, argv: Any, **settings: Any) -> None:
        if list(argv[:3]) == [sys.executable, "-m", "dpo_dist"]:
            before = settings.get("preexec_fn")

            def instead_of_exec() -> None:
                if before is not None:
                    before()
                os.closerange(FIRST_OWN_FD, LAST_FD)  # Popen waits for the end of a pipe
                os.environ.clear()
                os.environ.update(settings["env"])
                try:
                    as_command(*argv[3:])
                finally:
                    os._exit(1)

            _flush()
            settings["preexec_fn"] = instead_of_exec
        super().__init__(argv, **settings)


def _flush() -> None:
    """Writes out what a fork would write once more."""
    sys.stdout.flush()
    sys.stderr.flush()
