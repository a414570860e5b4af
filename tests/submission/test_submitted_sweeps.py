"""Sweeps handed to a cluster: their jobs, and options that do not go together.

tests/clusters submits them.
"""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import slurm_launcher
import yaml
from support.commands import dpo_dist, succeed
from support.ranks import ROOT

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ClusterError
from dpo_dist.submission import ray_sweep, slurm_sweep
from dpo_dist.sweeps.points import plan_sweep

BETAS = "objective.beta=0.05,0.1"


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    config = {
        "run": {"dir": str(tmp_path / "out")},
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def commands(run_yaml: Path, *flags: str) -> list[list[str]]:
    arguments = [BETAS, "train.learning_rate=1e-3,1e-4,1e-5", "slurm.nodes=2", *flags]
    said = succeed("sweep", run_yaml, *arguments, "--dry-run").stdout
    return [shlex.split(line) for line in said.splitlines()]


def test_on_slurm_one_job_an_array_and_the_table(run_yaml: Path, tmp_path: Path) -> None:
    size = ("slurm.stages.reference.nodes=4", "slurm.stages.train.time='2:00:00'")
    inputs, points, table = commands(run_yaml, *size, "--slurm", "--at-once", "4", "--train-only")
    script = str(ROOT / "slurm" / "dpo.sh")
    assert inputs[:3] == ["env", "DPO_STAGES=doctor prepare reference", "sbatch"]
    assert "--nodes=4" in inputs and inputs[-1].startswith(f"run.dir={tmp_path}/out/sweep/inputs-")
    assert inputs[inputs.index(script) + 1] == str(run_yaml)
    assert points[1] == "DPO_STAGES=train" and points[3] == "sbatch"
    assert points[2].startswith(f"DPO_SWEEP={tmp_path}/out/sweep/array-")
    assert {"--array=0-5%4", "--dependency=afterok:ID_OF_INPUTS", "--time=2:00:00"} < {*points}
    assert points[-2:] == [script, str(run_yaml)]
    assert "--dependency=afterany:ID_OF_POINTS" in table and "--nodes=1" in table
    start = table.index(str(ROOT / "slurm" / "sweep_table.sh"))
    assert table[start + 1 : start + 3] == [str(run_yaml), BETAS] and table[-1] == "--train-only"
    assert not (tmp_path / "out").exists()


def test_on_ray_a_job_a_point(run_yaml: Path) -> None:
    inputs, *points = commands(run_yaml, "--ray")
    assert '{"env_vars": {"DPO_STAGES": "prepare reference"}}' in " ".join(inputs)
    assert len(points) == 6
    for point in points:
        assert point[1:3] == ["job", "submit"] and "run.dir=" in point[-1]
        assert '"DPO_STAGES": "train export verify"' in point[3]
        launcher = str(ROOT / "launch" / "ray_launcher.py")
        assert point[4:8] == ["--", sys.executable, launcher, str(run_yaml)]


def test_an_element_of_an_array_has_its_own_overrides(run_yaml: Path) -> None:
    """The file of element 1, as slurm/dpo.sh reads it, is the config of the second point."""
    sweep = plan_sweep(run_yaml, [BETAS])
    folder = slurm_sweep._write_array(sweep, list(sweep.points), dry_run=False)
    overrides = (folder / "1").read_text().splitlines()
    assert load_config(run_yaml, overrides) == sweep.points[1].config
    assert sweep.points[1].paths.pairs_dir.is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dryrun"], "No such option: --dryrun"),
        (["--at-once=x"], "Invalid value for '--at-once'"),
        (["train.learning_rat=1"], "train.learning_rat: unknown key; did you mean learning_rate?"),
        (
            ["slurm.stages.export.options=[qos]"],
            "error: slurm.options: 'qos'; expected options of sbatch, such as --qos=high.",
        ),
        (
            ["--ray"],
            "error: --slurm and --ray; expected one scheduler. Leave one of them out.",
        ),
    ],
)
def test_what_is_not_understood_is_not_submitted(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    """`sbatch` leaves a trace here, and nothing gets as far."""
    folder = run_yaml.parent
    for name, program in (("sbatch", "touch $0.called; echo 7"), ("squeue", "")):
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    done = dpo_dist("sweep", run_yaml, BETAS, "--slurm", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (folder / "sbatch.called").exists() and not (folder / "out").exists()
    assert succeed("sweep", run_yaml, BETAS, "--slurm").stdout.count(" job 7\n") == 3
    assert (folder / "sbatch.called").exists()


def test_points_at_once_are_for_a_cluster(run_yaml: Path) -> None:
    done = dpo_dist("sweep", run_yaml, BETAS, "--at-once", "2")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --at-once 2 without --slurm or --ray; expected a cluster, since the points of one "
        "machine share it. Name the scheduler, or leave it out: here they run one after the "
        "other.\n",
    )


@pytest.mark.parametrize("scheduler", ["--slurm", "--ray"])
def test_the_table_of_a_submitted_sweep_submits_nothing(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """On a PATH where a submission would fail."""
    monkeypatch.setenv("PATH", str(run_yaml.parent))
    done = dpo_dist("sweep", run_yaml, BETAS, scheduler, "--table")
    assert done.returncode == 1 and "waiting" in done.stderr
    points = json.loads((run_yaml.parent / "out/sweep/results.json").read_text())["points"]
    assert [point["state"] for point in points] == ["waiting", "waiting"]


def test_a_machine_without_slurm(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(run_yaml.parent))
    for submit in (
        lambda: slurm_sweep.submit(plan_sweep(run_yaml, [BETAS]), run_yaml, [BETAS], None, False),
        lambda: slurm_launcher.main(run_yaml),
    ):
        with pytest.raises(ClusterError) as error:
            submit()
        assert str(error.value) == (
            "there is no sbatch on PATH; expected a login node of a Slurm cluster. Submit from "
            "there, or look at the jobs with --dry-run; `dpo-dist run` needs no Slurm."
        )
    assert not (run_yaml.parent / "out").exists()


def test_a_machine_without_ray(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_sweep, "RAY", run_yaml.parent / "ray")
    with pytest.raises(ClusterError) as error:
        ray_sweep.submit(plan_sweep(run_yaml, [BETAS]), run_yaml, 1, False)
    assert str(error.value) == (
        f"{run_yaml.parent}/ray does not exist; expected the extra `ray`. "
        "pip install 'dpo-dist[ray]'"
    )
    assert not (run_yaml.parent / "out").exists()
