"""A sweep as Slurm jobs.

1. A job prepares and scores the inputs of the points that share them.
2. An array has a job a point, and starts once that has ended well. Done points are left out.
3. A last job writes table and plot.

Jobs have the sizes of slurm.stages: reference, train and verify.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.errors import ClusterError
from dpo_dist.run.manifest import digest_of, write_atomic
from dpo_dist.run.pipeline import DOCTOR, EXPORT, REFERENCE, TRAIN
from dpo_dist.submission.programs import program
from dpo_dist.submission.sbatch import Submission, check_sbatch, job_options
from dpo_dist.sweeps.points import INPUT_STAGES, Point, Sweep, link_pairs, state_of

REMEDY = "Correct the slurm section; nothing of this sweep runs."


def submit(
    sweep: Sweep, config_path: Path, overrides: Sequence[str], at_once: int | None, dry_run: bool
) -> None:
    """Submits all jobs, `at_once` points at a time, or prints what it would submit.

    Raises ConfigError for a size that sbatch would not take, and ClusterError when there is no
    sbatch, when jobs of this sweep are still in the queue, or when sbatch refuses one.
    """
    name = f"{sweep.root.root.name}-sweep-{digest_of(str(sweep.root.root))[:6]}"
    # Made first: a bad one is refused before anything is submitted.
    sizes = {
        stage: job_options(sweep.points[0].config, stage) for stage in (REFERENCE, TRAIN, EXPORT)
    }
    if not dry_run:
        check_sbatch()
        _refuse_second(name)
    sbatch = ["sbatch", "--parsable", f"--job-name={name}", "--export=ALL"]
    script = str(program("slurm/dpo.sh"))
    jobs, arrays = Submission(dry_run), list[str]()
    for inputs in sweep.inputs:
        points = [
            point
            for point in sweep.points_of(inputs)
            if state_of(point, sweep.stages[-1].name).name != "done"
        ]
        if not points:
            continue
        stages = " ".join(stage.name for stage in (DOCTOR, *INPUT_STAGES))
        first = [
            "env", f"DPO_STAGES={stages}",
            *sbatch, *sizes[REFERENCE], script, str(config_path), *inputs.overrides,
        ]  # fmt: skip
        inputs_id = jobs.submit("inputs", first, REMEDY)
        folder = _write_array(sweep, points, dry_run)
        stages = " ".join(stage.name for stage in sweep.stages)
        many = f"--array=0-{len(points) - 1}" + (f"%{at_once}" if at_once else "")
        array = [
            "env", f"DPO_STAGES={stages}", f"DPO_SWEEP={folder}",
            *sbatch, many, f"--dependency=afterok:{inputs_id}", "--kill-on-invalid-dep=yes",
            *sizes[TRAIN], script, str(config_path),
        ]  # fmt: skip
        arrays.append(jobs.submit("points", array, REMEDY))
    after = [f"--dependency=afterany:{':'.join(arrays)}"] if arrays else []
    only = ["--train-only"] if sweep.train_only else []
    table = [
        *sbatch, *after, *sizes[EXPORT],  # one process too
        str(program("slurm/sweep_table.sh")), str(config_path), *overrides, *only,
    ]  # fmt: skip
    jobs.submit("table", table, REMEDY)


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
