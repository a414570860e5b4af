"""Submit a sweep to Slurm; `dpo-dist sweep ... --slurm` runs this.

    python launch/slurm_sweep.py run.yaml section.key=a,b [--at-once=N] [--train-only] [--dry-run]

A job prepares and scores the inputs, an array has a job a point (N at a time) once that has ended
well, and a last job writes table and plot. Points that are done are left out. Jobs have the sizes
of slurm.stages: reference, train and verify.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from slurm_launcher import SCRIPT, check_sbatch, job_options

from dpo_dist.errors import ClusterError, DPODistError
from dpo_dist.run.manifest import digest_of, write_atomic
from dpo_dist.sweeps.points import (
    INPUT_STAGES,
    Point,
    Run,
    Sweep,
    link_pairs,
    plan_sweep,
    state_of,
)

TABLE_SCRIPT = SCRIPT.parent / "sweep_table.sh"


class Submission:
    """Jobs of one sweep; a refused one cancels those before it."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run, self.job_ids = dry_run, list[str]()

    def submit(self, what: str, command: list[str]) -> str:
        """The job's id; in a dry run prints the command instead."""
        if self.dry_run:
            print(shlex.join(command))
            return f"ID_OF_{what.upper()}"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if self.job_ids:
                subprocess.run(["scancel", *self.job_ids], check=False)
            raise ClusterError(
                f"sbatch refuses {what} (exit {done.returncode}: {done.stderr.strip()})",
                "jobs that the cluster takes",
                "Correct the slurm section; nothing of this sweep runs.",
            )
        self.job_ids.append(done.stdout.strip().split(";")[0])
        print(f"{what:<10} job {self.job_ids[-1]}", flush=True)
        return self.job_ids[-1]


def main() -> None:
    flags = {a for a in sys.argv[1:] if a.startswith("--")}
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    at_once = next((int(f.partition("=")[2]) for f in flags if f.startswith("--at-once=")), None)
    if not arguments:
        print(__doc__)
        sys.exit(0 if "--help" in flags else 2)
    try:
        sweep = plan_sweep(Path(arguments[0]), arguments[1:], train_only="--train-only" in flags)
        submit(sweep, arguments, at_once, "--dry-run" in flags)
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def submit(sweep: Sweep, arguments: list[str], at_once: int | None, dry_run: bool) -> None:
    """Submits all jobs, or prints what it would submit.

    Raises ClusterError when there is no sbatch, when jobs of this sweep are still in the queue, or
    when sbatch refuses one.
    """
    name = f"{sweep.root.root.name}-sweep-{digest_of(str(sweep.root.root))[:6]}"
    if not dry_run:
        check_sbatch()
        _refuse_second(name)
    jobs, arrays = Submission(dry_run), list[str]()
    for inputs in sweep.inputs:
        points = [
            point
            for point in sweep.points_of(inputs)
            if state_of(point, sweep.stages[-1].name).name != "done"
        ]
        if not points:
            continue
        first = jobs.submit("inputs", inputs_command(inputs, name, arguments[0]))
        folder = _write_array(sweep, points, dry_run)
        stages = " ".join(stage.name for stage in sweep.stages)
        many = f"--array=0-{len(points) - 1}" + (f"%{at_once}" if at_once else "")
        arrays.append(
            jobs.submit(
                "points",
                [
                    "env",
                    f"DPO_STAGES={stages}",
                    f"DPO_SWEEP={folder}",
                    "sbatch",
                    "--parsable",
                    f"--job-name={name}",
                    "--export=ALL",
                    many,
                    f"--dependency=afterok:{first}",
                    "--kill-on-invalid-dep=yes",
                    *job_options(points[0].config, "train"),
                    str(SCRIPT),
                    arguments[0],
                ],  # fmt: skip
            )
        )
    after = [f"--dependency=afterany:{':'.join(arrays)}"] if arrays else []
    only = ["--train-only"] if sweep.train_only else []
    jobs.submit(
        "table",
        [
            "sbatch",
            "--parsable",
            f"--job-name={name}",
            "--export=ALL",
            *after,
            *job_options(sweep.points[0].config, "verify"),
            str(TABLE_SCRIPT),
            *arguments,
            *only,
        ],  # fmt: skip
    )


def inputs_command(inputs: Run, name: str, config_path: str) -> list[str]:
    """The job that prepares and scores what points share."""
    stages = " ".join(["doctor", *(stage.name for stage in INPUT_STAGES)])
    return [
        "env", f"DPO_STAGES={stages}",
        "sbatch", "--parsable", f"--job-name={name}", "--export=ALL",
        *job_options(inputs.config, "reference"), str(SCRIPT), config_path, *inputs.overrides,
    ]  # fmt: skip


def _write_array(sweep: Sweep, points: list[Point], dry_run: bool) -> Path:
    """A file for each element of the array, with one override a line; and the links to the pairs.

    The folder's name tells the points, so a later submission never changes what an element reads.
    """
    folder = sweep.root.sweep_array_dir(digest_of([point.overrides for point in points])[:8])
    for number, point in enumerate(points if not dry_run else ()):
        link_pairs(point)
        write_atomic(folder / str(number), "".join(f"{text}\n" for text in point.overrides))
    return folder


def _refuse_second(name: str) -> None:
    """Two jobs of one point would write into the same run folder."""
    command = ["squeue", "--noheader", "--format=%i", f"--name={name}", f"--user={os.getuid()}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if found := listed.stdout.split():
        raise ClusterError(
            f"{len(found)} jobs of this sweep are in the queue ({' '.join(found[:5])})",
            "one submission of a sweep at a time",
            f"Wait for them, or `scancel --name={name}`, then submit again.",
        )


if __name__ == "__main__":
    main()
