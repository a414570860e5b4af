"""Each supported Python with pinned and with the lowest allowed versions: a table of what passes.

    python .ci/matrix.py --python 3.11 3.12 3.13 --resolution pinned lowest

1. uv makes a virtual environment: `pinned` installs what constraints.txt says, `lowest` the lower
   bound of every dependency and extra in pyproject.toml.
2. A lower bound that cannot be installed, because another package needs a newer one or because
   there is no wheel, is a wrong bound and fails.
3. A subset of the tests runs there: every library is used once, ranks and DeepSpeed included.

An interpreter or a package that cannot be downloaded is named in the table and fails nothing. uv
reads its own settings: UV_TORCH_BACKEND=cpu takes torch without CUDA from PyTorch's index.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = ("pinned", "lowest")
EXTRAS = ("eval", "qlora", "quickstart", "ray", "wandb")
ORACLE = "trl"  # of the extra `dev`: what losses are compared with
TEST_TOOLS = ("hatchling", "pytest", "pytest-timeout")  # at their pins, in both resolutions
ONLY_SOURCE = {"deepspeed"}  # PyPI has no wheel of it
TESTS = (
    "tests/config/test_config.py", "tests/data/rows", "tests/data/tokens", "tests/objective",
    "tests/reference", "tests/metrics", "tests/report", "tests/importing",
    "tests/engine/forward/test_forward.py", "tests/engine/checkpoints/test_shards.py",
    "tests/stages/test_pipeline.py::test_the_run_learns_and_reports",
    "tests/stages/test_pipeline.py::test_killed_and_resumed_is_bit_equal_to_unbroken",
    "tests/stages/test_pipeline.py::test_lora_is_exported_merged_and_verified",
)  # fmt: skip
INSTALL_S, TEST_S = 900, 1800
UNREACHABLE = re.compile(r"Failed to (fetch|download)|error sending request|timed out|dns error")
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Outcome:
    """A row of the table: `state` is passed, failed or could not be had."""

    python: str
    resolution: str
    state: str
    detail: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--resolution", nargs="+", default=RESOLUTIONS, choices=RESOLUTIONS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for python in chosen.python:
        for resolution in chosen.resolution:
            outcomes.append(try_out(python, resolution, chosen.folder))
            print(f"{python} {resolution}: {outcomes[-1].state}", flush=True)
    table = table_of(outcomes)
    (chosen.folder / "summary.md").write_text(table)
    print(f"\n{table}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


def try_out(python: str, resolution: str, folder: Path) -> Outcome:
    """Installs and tests in a new environment, which is deleted again; its log stays."""
    name = f"{python}-{resolution}"
    venv, log = folder / name, folder / f"{name}.log"
    log.write_text("")
    try:
        state, detail = _try_out(python, resolution, venv, log)
    finally:
        shutil.rmtree(venv, ignore_errors=True)
    return Outcome(python, resolution, state, detail)


def _try_out(python: str, resolution: str, venv: Path, log: Path) -> tuple[str, str]:
    code, output = run([UV, "venv", "--clear", "--python", python, venv], log, 300)
    if code:
        return "could not be had", f"interpreter: {last_line(output)}"
    interpreter = venv / "bin" / "python"
    started = time.monotonic()
    code, output = run(install_command(interpreter, resolution), log, INSTALL_S)
    if code:
        state = "could not be had" if UNREACHABLE.search(output) or code == 124 else "failed"
        return state, f"install: {last_line(output)}"
    installed = time.monotonic() - started
    if resolution == "lowest" and (above := bounds_above(interpreter)):
        return "failed", f"lower bounds that cannot be installed: {', '.join(above)}"
    started = time.monotonic()
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not cluster", "--durations=0")
    code, output = run([interpreter, "-m", "pytest", *options, *TESTS], log, TEST_S)
    tested = time.monotonic() - started
    times = f"install {installed:.0f} s, tests {tested:.0f} s"
    return ("failed" if code else "passed"), f"{last_line(output)}; {times}"


def install_command(interpreter: Path, resolution: str) -> list[str | Path]:
    """uv's command line; lower bounds are taken from wheels only, where there are wheels."""
    pins = pins_of(ROOT / "constraints.txt")
    tools = [f"{name}=={pins[name]}" for name in TEST_TOOLS]
    package = f"{ROOT}[{','.join(EXTRAS)}]"
    oracle = f"{ORACLE}>={lower_bounds()[ORACLE]}"
    command = [UV, "pip", "install", "--python", interpreter, "-e", package, oracle]
    if resolution == "pinned":
        return [*command, *tools, "--constraints", ROOT / "constraints.txt"]
    wheels = sorted(lower_bounds().keys() - ONLY_SOURCE)
    only_wheels = [part for name in wheels for part in ("--only-binary", name)]
    return [*command, *tools, "--resolution", "lowest-direct", *only_wheels]


def run(command: Sequence[str | Path], log: Path, timeout_s: float) -> tuple[int, str]:
    """Exit code and output, which goes to the log as well; 124 when it took too long."""
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment(), timeout=timeout_s, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, output = 124, f"took more than {timeout_s:.0f} s"
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(map(str, command))}\n{output}\n")
    return code, output


def environment() -> dict[str, str]:
    """pyenv's interpreters are found too; the tree that is tested is this one."""
    hidden = {"VIRTUAL_ENV", "PYTHONPATH"}
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    if pyenv := shutil.which("pyenv"):
        found = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True)
        named = [name for name in found.stdout.split() if name.startswith(PYTHONS)]
        variables.setdefault("PYENV_VERSION", ":".join(named))
    return variables | {"TOKENIZERS_PARALLELISM": "false"}


def lower_bounds() -> dict[str, str]:
    """The lowest version of every dependency and of every extra that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for name in EXTRAS for r in extras[name])]
    wanted += [requirement for requirement in extras["dev"] if requirement.startswith(ORACLE)]
    parts = [requirement.split(">=") for requirement in wanted]
    return {_plain(name.split("[")[0]): version for name, version in parts}


def bounds_above(interpreter: Path) -> list[str]:
    """Dependencies of which a newer version than the lower bound was installed."""
    command = [UV, "pip", "list", "--python", interpreter, "--format", "json"]
    listed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = {_plain(p["name"]): p["version"].split("+")[0] for p in json.loads(listed.stdout)}
    return [
        f"{name} {bound} (installed {found[name]})"
        for name, bound in lower_bounds().items()
        if _release(found[name]) != _release(bound)
    ]


def pins_of(path: Path) -> dict[str, str]:
    lines = [line.split("==") for line in path.read_text().splitlines() if "==" in line]
    return {_plain(name): version for name, version in lines}


def table_of(outcomes: Sequence[Outcome]) -> str:
    rows = [f"| {o.python} | {o.resolution} | {o.state} | {o.detail} |\n" for o in outcomes]
    return "| Python | versions | result | |\n| --- | --- | --- | --- |\n" + "".join(rows)


def last_line(output: str) -> str:
    """The line that says most: uv's error and its cause, or the last one with a word."""
    lines = [line.strip(" |=") for line in output.splitlines() if NAME.search(line)]
    errors = [line for line in lines if line.startswith(("error:", "cause:"))]
    return " ".join(errors[:2] or lines[-1:]) or "no output"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _release(version: str) -> tuple[int, ...]:
    """1.0 is 1.0.0."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


if __name__ == "__main__":
    sys.exit(main())
