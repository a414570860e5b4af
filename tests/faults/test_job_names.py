"""Run folders whose names a shell would read otherwise: FAULTS 30."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import ROOT

NAME = 'a b\'s; touch broken $(touch broken) "x"'
SBATCH = """#!{python}
import json, sys
with open({log!r}, "a") as stream:
    print(json.dumps(sys.argv[1:]), file=stream)
print(7)
"""


@pytest.mark.fault(
    30,
    "a run folder named with spaces, quotes, a semicolon and a command, handed to Slurm",
    becomes="job names as they are, also when a shell runs what a dry run prints",
)
def test_fault_30_job_names_are_handed_on_as_they_are(tmp_path: Path) -> None:
    out, log, programs = tmp_path / NAME, tmp_path / "log", tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable, log=str(log)))
    sbatch.chmod(0o755)
    run_yaml = tmp_path / "run.yaml"
    values = {"run": {"dir": str(out)}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    run_yaml.write_text(json.dumps(values))  # is YAML too
    command = [sys.executable, ROOT / "launch" / "slurm_launcher.py", run_yaml, "slurm.nodes=2"]
    where = {"env": os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}, "cwd": tmp_path}

    def submitted() -> list[list[str]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return lines

    subprocess.run(command, check=True, timeout=120, **where)
    directly = submitted()
    names = [option for job in directly for option in job if option.startswith("--job-name=")]
    stages = ("doctor", "prepare", "reference", "train", "export", "verify")
    assert names == [f"--job-name={NAME}-{stage}" for stage in stages]

    dry = subprocess.check_output([*command, "--dry-run"], text=True, timeout=120, **where)
    commands = [line for line in dry.splitlines() if line.startswith("sbatch ")]
    subprocess.run(["sh", "-e"], input="\n".join(commands), text=True, check=True, **where)
    shown = [[o for o in job if "--dependency=" not in o] for job in submitted()]
    assert shown == [[o for o in job if "--dependency=" not in o] for job in directly]
    assert not list(tmp_path.rglob("broken"))
