"""The chain of Slurm jobs: what each is asked for. tests/clusters/test_slurm.py submits them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError

PATH = Path(__file__).parents[2] / "launch" / "slurm_launcher.py"


def load() -> Any:
    """The program as a module; nothing else imports it."""
    spec = importlib.util.spec_from_file_location("slurm_launcher", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(stage: str, slurm: dict[str, Any], after: list[str] | None = None) -> list[str]:
    config = parse_config(
        {
            "run": {"dir": "runs/mine"},
            "model": {"path": "m"},
            "data": {"train": [{"path": "a"}]},
            "slurm": slurm,
        }
    )
    return load().sbatch_command(config, stage, Path("run.yaml"), ["a.b=1"], after or [])


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("partition", "big", "--partition=big"),
        ("account", "me", "--account=me"),
        ("nodes", 8, "--nodes=8"),
        ("tasks_per_node", 4, "--ntasks-per-node=4"),
        ("gpus_per_node", 4, "--gpus-per-node=4"),
        ("cpus_per_task", 6, "--cpus-per-task=6"),
        ("time", "12:00:00", "--time=12:00:00"),
        ("options", ["--qos=high"], "--qos=high"),
    ],
)
def test_a_key_holds_for_every_job_or_for_one_stage(key: str, value: Any, option: str) -> None:
    assert option in command("train", {key: value})
    assert option not in command("train", {})
    other = {"stages": {"train": {key: value}}}
    assert option in command("train", other) and option not in command("reference", other)


def test_the_own_keys_of_a_stage_win() -> None:
    slurm = {"nodes": 2, "stages": {"train": {"nodes": 8}, "export": {"nodes": 3}}}
    assert "--nodes=2" in command("reference", slurm)
    assert "--nodes=8" in command("train", slurm)
    assert "--nodes=3" in command("export", slurm)
    assert "--nodes=1" in command("verify", slurm), "one process needs one node"


def test_a_job_waits_for_the_one_before() -> None:
    assert not any("dependency" in part for part in command("doctor", {}))
    later = command("train", {}, ["7", "8"])
    assert "--dependency=afterok:8" in later and "--kill-on-invalid-dep=yes" in later
    assert later[:4] == [
        "sbatch",
        "--parsable",
        "--job-name=mine-train",
        "--export=ALL,DPO_STAGES=train",
    ]
    assert later[-3:] == [str(PATH.parent.parent / "slurm" / "dpo.sh"), "run.yaml", "a.b=1"]


def test_an_option_that_is_none() -> None:
    with pytest.raises(ConfigError) as error:
        command("train", {"options": ["qos=high"]})
    assert str(error.value) == (
        "slurm.options: 'qos=high'; expected options of sbatch, such as --qos=high. Correct it."
    )


@pytest.mark.parametrize(
    ("program", "beta"), [("slurm_launcher.py", "0.1"), ("slurm_sweep.py", "0.1,0.2")]
)
def test_a_machine_without_slurm(program: str, beta: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}")
    done = subprocess.run(
        [sys.executable, PATH.with_name(program), config, f"objective.beta={beta}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no sbatch on PATH; expected a login node of a Slurm cluster. Submit from "
        "there, or look at the jobs with --dry-run; `dpo-dist run` needs no Slurm.\n",
    )
    assert not (tmp_path / "out").exists()
