"""Optional packages that are installed and broken: the reason is told, not a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.faults.broken_package import BROKEN, broken_package
from support.tiny_run import make_run

from dpo_dist.extras import import_fault, in_one_line

LAUNCHER = "import ray_launcher; ray_launcher.start(ray_launcher.main)"
CHECKED = """
import sys
from pathlib import Path
from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ConfigError
from dpo_dist.inputs.work import checked_work
from dpo_dist.model_files.of_run import RunModels
try:
    checked_work(RunModels(load_config(Path(sys.argv[1]), sys.argv[2:])))
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
"""
TASKS = """
from dpo_dist.commands.harness import _task_manager
from dpo_dist.errors import HarnessError
import sys
try:
    _task_manager(["piqa"], None)
except HarnessError as error:
    print(f"error: {error}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("package", "program", "overrides", "said"),
    [
        (
            "bitsandbytes", CHECKED, ["model.quantization=nf4", "adapter.rank=4"],
            f"model.quantization: nf4, and bitsandbytes does not import: {BROKEN}; expected "
            "bitsandbytes. Install it with `pip install --force-reinstall --no-deps bitsandbytes`, "
            "or choose another value.",
        ),
        (
            "wandb", CHECKED, ["logging.wandb=true"],
            f"logging.wandb is set, and wandb does not import: {BROKEN}; expected the extra "
            "`wandb`. pip install --force-reinstall --no-deps wandb, or set logging.wandb=false.",
        ),
        (
            "ray", LAUNCHER, [],
            f"ray does not import: {BROKEN}; expected the extra `ray`. "
            "pip install --force-reinstall --no-deps ray",
        ),
        (
            "lm_eval", TASKS, [],
            f"lm-eval does not import: {BROKEN}; expected it, for --harness. "
            "pip install --force-reinstall --no-deps lm_eval",
        ),
    ],
)  # fmt: skip
def test_truth_09_a_package_that_does_not_import_is_told(
    package: str, program: str, overrides: list[str], said: str, tmp_path: Path
) -> None:
    run_yaml = make_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_yaml), *overrides],
        capture_output=True, text=True, timeout=120,
        env=broken_package(tmp_path, package) | {"COLUMNS": "1000"},
    )  # fmt: skip
    assert " ".join(done.stderr.split()) == f"error: {said}"


def test_a_package_that_is_missing_and_one_that_misses_another() -> None:
    missing = ModuleNotFoundError("No module named 'wandb'", name="wandb")
    assert import_fault("wandb", "wandb", missing) == (
        "is not installed", "pip install 'dpo-dist[wandb]'",
    )  # fmt: skip
    other = ModuleNotFoundError("No module named 'git'", name="git")
    assert import_fault("wandb", "wandb", other) == (
        "does not import: No module named 'git'",
        "pip install --force-reinstall --no-deps wandb",
    )
    assert in_one_line(RuntimeError("\n CUDA\n\n SETUP " + 400 * "x")).startswith("CUDA SETUP xx")
    assert in_one_line(ValueError()) == "ValueError()"
