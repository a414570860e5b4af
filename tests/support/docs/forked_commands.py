"""The command line as a user sees it, without importing torch anew for every process.

    output = run_command("dpo-dist train run.yaml", folder)

The command runs in a fork of the process behind `support.ranks`, which has imported what the stages
need; the ranks that it starts are forks of it in turn. All else is as in a shell: arguments,
environment, working directory, exit codes.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.ranks import started_ranks

from dpo_dist.run.topology import VARIABLES

TIMEOUT_S = 240
COLUMNS = 1000  # of the terminal: nothing is wrapped
FIRST_OWN_FD, LAST_FD = 3, 4096


def run_command(command: str, folder: Path, hub: str) -> str:
    """What `command` writes to stdout and stderr, in `folder`, and how it ended if not with 0 or 2.

    `NAME=value` may stand in front of it; `hub` is the address of the Hugging Face Hub.
    """
    with started_ranks(1, _run, command, str(folder), hub) as ranks:
        (result,) = ranks.wait(TIMEOUT_S)
    ended = "" if result.value in (0, 2) else f"\nexit code {result.value or result.exit_code}\n"
    return result.output + ended


def _run(command: str, folder: str, hub: str) -> int:
    from huggingface_hub import constants

    from dpo_dist.run import logs

    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    for name in (*VARIABLES, "HF_TOKEN"):
        os.environ.pop(name, None)
    words = shlex.split(command)
    program = words.index("dpo-dist")
    variables = dict(word.split("=", 1) for word in words[:program])
    os.environ.update(variables, COLUMNS=str(COLUMNS), CUDA_VISIBLE_DEVICES="")
    # what variables would do, had they been set before the imports
    logs.console.width = COLUMNS
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub, False, True
    constants.HF_TOKEN_PATH = f"{folder}/no-token"
    subprocess.Popen = _Forking
    return _main(words[program + 1 :])


def _main(arguments: list[str]) -> int:
    from dpo_dist.cli.app import command

    sys.argv = ["dpo-dist", *arguments]
    try:
        return command()
    finally:
        _flush()


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
                code = 1
                try:
                    code = _main(list(argv[3:]))
                finally:
                    os._exit(code)

            _flush()
            settings["preexec_fn"] = instead_of_exec
        super().__init__(argv, **settings)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
