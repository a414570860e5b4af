"""The chain of Slurm jobs: what each is asked for. tests/clusters/test_slurm.py submits them."""

from typing import Any

import pytest
import slurm_launcher
from support.ranks import ROOT

from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError
from dpo_dist.run.pipeline import submitted_stage
from dpo_dist.submission.sbatch import job_options


def command(stage_name: str, slurm: dict[str, Any], before: str | None = None) -> list[str]:
    config = parse_config(
        {
            "run": {"dir": "runs/mine"},
            "model": {"path": "m"},
            "data": {"train": [{"path": "a"}]},
            "slurm": slurm,
        }
    )
    stage = submitted_stage(stage_name)
    size = job_options(config, stage)
    return slurm_launcher.sbatch_command(config, stage, size, before, ["run.yaml", "a.b=1"])


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
    later = command("train", {}, "8")
    assert "--dependency=afterok:8" in later and "--kill-on-invalid-dep=yes" in later
    assert later[:4] == [
        "sbatch",
        "--parsable",
        "--job-name=mine-train",
        "--export=ALL,DPO_STAGES=train",
    ]
    assert later[-3:] == [str(ROOT / "slurm" / "dpo.sh"), "run.yaml", "a.b=1"]


def test_an_option_that_is_none() -> None:
    with pytest.raises(ConfigError) as error:
        command("train", {"options": ["qos=high"]})
    assert str(error.value) == (
        "slurm.options: 'qos=high'; expected options of sbatch, such as --qos=high. Correct it."
    )
