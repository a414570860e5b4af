"""A sweep as Ray jobs: one for the inputs, then one a point; this process waits for them.

RAY_API_SERVER_ADDRESS names the cluster. After a stop the same command goes on: points that are
done are left out.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.errors import ClusterError
from dpo_dist.run.pipeline import Stage
from dpo_dist.submission.programs import program
from dpo_dist.sweeps.points import INPUT_STAGES, Run, Sweep, link_pairs, state_of

RAY = Path(sys.executable).with_name("ray")


def submit(sweep: Sweep, config_path: Path, at_once: int, dry_run: bool) -> None:
    """Runs the jobs and waits; what became of them is in each run's status.json.

    A dry run prints the commands instead. Raises ClusterError when Ray is not installed.
    """
    if not dry_run and not RAY.is_file():
        raise ClusterError(
            f"{RAY} does not exist", "the extra `ray`", "pip install 'dpo-dist[ray]'"
        )
    for inputs in sweep.inputs:
        todo = [
            point
            for point in sweep.points_of(inputs)
            if state_of(point, sweep.stages[-1].name).name != "done"
        ]
        if not todo or _submit(inputs, INPUT_STAGES, config_path, dry_run):
            continue
        for point in todo if not dry_run else ():
            link_pairs(point)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda point: _submit(point, sweep.stages, config_path, dry_run), todo))


def _submit(one: Run, stages: Sequence[Stage], config_path: Path, dry_run: bool) -> int:
    """Submits a job and waits for it; its exit code."""
    command = job_command(one, stages, config_path)
    if dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command, check=False).returncode


def job_command(one: Run, stages: Sequence[Stage], config_path: Path) -> list[str]:
    """`ray job submit` of one run of the sweep."""
    variables = {"env_vars": {"DPO_STAGES": " ".join(stage.name for stage in stages)}}
    return [
        str(RAY), "job", "submit", f"--runtime-env-json={json.dumps(variables)}", "--",
        sys.executable, str(program("launch/ray_launcher.py")), str(config_path.absolute()),
        *one.overrides,
    ]  # fmt: skip
