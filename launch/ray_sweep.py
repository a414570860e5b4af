"""Run a sweep as Ray jobs; `dpo-dist sweep ... --ray` runs this.

    python launch/ray_sweep.py run.yaml section.key=a,b [--at-once=N] [--train-only] [--dry-run]

The inputs are one job of launch/ray_launcher.py, then each point is one, N at a time (1 unless said
otherwise); this program waits for them and writes table and plot. RAY_API_SERVER_ADDRESS names the
cluster. Start the same command again after a stop: points that are done are left out.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.errors import DPODistError
from dpo_dist.run.pipeline import Stage
from dpo_dist.sweeps.points import INPUT_STAGES, Run, Sweep, link_pairs, plan_sweep, state_of

LAUNCHER = Path(__file__).absolute().with_name("ray_launcher.py")
RAY = Path(sys.executable).with_name("ray")


def main() -> None:
    flags = {a for a in sys.argv[1:] if a.startswith("--")}
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    at_once = next((int(f.partition("=")[2]) for f in flags if f.startswith("--at-once=")), 1)
    if not arguments:
        print(__doc__)
        sys.exit(0 if "--help" in flags else 2)
    try:
        sweep = plan_sweep(Path(arguments[0]), arguments[1:], train_only="--train-only" in flags)
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run(sweep, Path(arguments[0]), at_once, "--dry-run" in flags)
    if "--dry-run" not in flags:
        only = ["--train-only"] if sweep.train_only else []
        table = [sys.executable, "-m", "dpo_dist", "sweep", *arguments, *only, "--table"]
        sys.exit(subprocess.run(table, check=False).returncode)


def run(sweep: Sweep, config_path: Path, at_once: int, dry_run: bool) -> None:
    """Runs the jobs and waits; what became of them is in each run's status.json."""
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
        sys.executable, str(LAUNCHER), str(config_path.absolute()), *one.overrides,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
