"""The command line itself; what the commands do has tests of its own."""

import json

import pytest
from support.commands import dpo_dist, succeed
from typer.main import get_command

import dpo_dist as package
from dpo_dist.cli.app import app

COMMANDS = (
    "run", "sweep", "prepare", "reference", "train", "export", "verify", "push", "evaluate",
    "generate", "judge", "doctor", "status", "report", "plan", "config", "import-trl",
    "import",
)  # fmt: skip


def test_the_version() -> None:
    assert succeed("--version").stdout == f"{package.__version__}\n"


def test_help_names_every_command() -> None:
    """All that there are, in this order, each with what it is for."""
    _, _, listed = succeed("--help").stdout.partition(" Commands ")
    rows = [line.strip("│ ").split(None, 1) for line in listed.splitlines()[1:] if "│" in line]
    assert [name for name, _ in rows] == list(COMMANDS)
    assert all(purpose.strip().endswith(".") for _, purpose in rows)
    assert list(vars(get_command(app))["commands"]) == list(COMMANDS)


def test_the_schema_is_json() -> None:
    schema = json.loads(succeed("config", "--schema").stdout)
    assert "train" in schema["properties"] and schema["additionalProperties"] is False


@pytest.mark.parametrize("command", ["train", "plan", "run"])
def test_a_config_that_is_not_there(command: str) -> None:
    done = dpo_dist(command, "nowhere.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == (
        "error: nowhere.yaml: No such file or directory; expected a readable YAML run config. "
        "Start from one in examples/.\n"
    )


def test_ranks_are_at_least_one() -> None:
    done = dpo_dist("plan", "examples/quickstart.yaml", "--world-size", "0")
    assert done.returncode == 2 and "greater than or equal to 1" in " ".join(done.stderr.split())
