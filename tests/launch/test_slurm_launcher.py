"""The chain of Slurm jobs: what each is asked for. tests/clusters/test_slurm.py submits them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import slurm_launcher
from support.ranks import ROOT, wait_until

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
    assert "--nodes=2" in command("verify", slurm)
    assert "--nodes=1" in command("push", slurm), "one process needs one node"


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


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGUSR2, 75), (signal.SIGKILL, 137)])
def test_truth_07_a_task_tells_which_signal_killed_its_rank(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """Slurm signals every process of a step; the memory limit kills one only."""
    text = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} {{os.environ[\"RANK\"]}}')\n"
        # a signal that comes just before a sleep is answered after it
        "for _ in range(600): time.sleep(0.1)\n"
    )
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
    task = subprocess.Popen(
        [ROOT / "slurm" / "task.sh", sys.executable, "-c", text],
        env=os.environ | slurm | {"LOG_DIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        pid, rank = (tmp_path / "pid").read_text().split()
        assert rank == "1"
        if sent == signal.SIGUSR2:
            os.killpg(task.pid, sent)
        else:
            os.kill(int(pid), sent)
        assert task.wait(30) == code
    finally:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*.failed.json")]
    killed = {"signal": 9, "exit_code": 137, "restartable": True}
    assert notes == ([killed] if sent == signal.SIGKILL else [])
