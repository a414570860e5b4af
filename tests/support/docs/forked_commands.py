"""A command of the docs as a reader would give it, in a folder of the test's.

output = run_command("dpo-dist train run.yaml", folder, hub)
"""

import os
import shlex
from pathlib import Path

from support.commands import as_command, as_user
from support.ranks import started_ranks

TIMEOUT_S = 240
COLUMNS = 1000  # of the terminal: nothing is wrapped


def run_command(command: str, folder: Path, hub: str) -> str:
    """What `command` writes to stdout and stderr, in `folder`, and how it ended if not with 0 or 2.

    `NAME=value` may stand in front of it; `hub` is the address of the Hugging Face Hub.
    """
    with started_ranks(1, _run, command, str(folder), hub) as ranks:
        (result,) = ranks.wait(TIMEOUT_S)
    code = result.exit_code
    return result.output + ("" if code in (0, 2) else f"\nexit code {code}\n")


def _run(command: str, folder: str, hub: str) -> None:
    from huggingface_hub import constants

    from dpo_dist.run import logs

    os.chdir(folder)
    as_user()
    os.environ.pop("HF_TOKEN", None)
    words = shlex.split(command)
    program = words.index("dpo-dist")
    variables = dict(word.split("=", 1) for word in words[:program])
    os.environ.update(variables, COLUMNS=str(COLUMNS), CUDA_VISIBLE_DEVICES="")
    # what variables would do, had they been set before the imports
    logs.console.width = COLUMNS
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub, False, True
    constants.HF_TOKEN_PATH = f"{folder}/no-token"
    as_command(*words[program + 1 :])
