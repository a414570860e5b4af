"""Submit a run as a chain of Slurm jobs, a job a stage, each with its own nodes, GPUs and time.

    python launch/slurm_launcher.py run.yaml [section.key=value ...] [--dry-run]

Sizes come from the `slurm:` section of the run config: its keys hold for every job, those under
`slurm.stages.NAME` for one. A job starts when the one before it has ended well, and is cancelled
when that failed. Everything else is slurm/dpo.sh, which every job runs for its stage alone.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dpo_dist.config.cluster_section import SlurmJobSection
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ClusterError, ConfigError, DPODistError
from dpo_dist.run.pipeline import DOCTOR, stages_of

SCRIPT = Path(__file__).absolute().parent.parent / "slurm" / "dpo.sh"
# One process on one node, whatever the distributed stages have.
ALONE = SlurmJobSection(nodes=1)  # pyright: ignore[reportCallIssue]


def main() -> None:
    arguments = sys.argv[1:]
    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    try:
        submit(Path(arguments[0]), arguments[1:], dry_run)
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def submit(config_path: Path, overrides: list[str], dry_run: bool) -> None:
    """Submits the jobs and prints their ids, or prints what it would submit.

    Raises ConfigError for a name that sbatch would not take, and ClusterError when there is no
    sbatch or it refuses a job; those that were submitted before it are cancelled.
    """
    config = load_config(config_path, overrides)
    if not dry_run:
        check_sbatch()
    job_ids: list[str] = []
    for stage in (DOCTOR, *stages_of(config)):
        command = sbatch_command(config, stage.name, config_path, overrides, job_ids)
        if dry_run:
            print(shlex.join(command))
            job_ids.append(f"ID_OF_{stage.name.upper()}")
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if job_ids:
                subprocess.run(["scancel", *job_ids], check=False)
            raise ClusterError(
                f"sbatch refuses {stage.name} (exit {done.returncode}: {done.stderr.strip()})",
                "a job that the cluster takes",
                f"Correct slurm or slurm.stages.{stage.name}; nothing of this chain runs.",
            )
        job_ids.append(done.stdout.strip().split(";")[0])
        print(f"{stage.name:<10} job {job_ids[-1]}", flush=True)
    if dry_run:
        print(f"\n# {SCRIPT}\n{SCRIPT.read_text()}", end="")


def check_sbatch() -> None:
    """Raises ClusterError on a machine without Slurm's commands."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "there is no sbatch on PATH",
            "a login node of a Slurm cluster",
            "Submit from there, or look at the jobs with --dry-run; `dpo-dist run` needs no Slurm.",
        )


def sbatch_command(
    config: RunConfig,
    stage: str,
    config_path: Path,
    overrides: list[str],
    job_ids: list[str],
) -> list[str]:
    """The sbatch command of one stage, after the last of `job_ids`."""
    after = [f"--dependency=afterok:{job_ids[-1]}", "--kill-on-invalid-dep=yes"] if job_ids else []
    return [
        "sbatch", "--parsable", f"--job-name={config.run.dir.name}-{stage}",
        f"--export=ALL,DPO_STAGES={stage}", *after, *job_options(config, stage),
        str(SCRIPT), os.fspath(config_path), *overrides,
    ]  # fmt: skip


def job_options(config: RunConfig, stage: str) -> list[str]:
    """Options of sbatch for the size of one stage; raises ConfigError for what is none."""
    distributed = {s.name: s.distributed for s in (DOCTOR, *stages_of(config))}[stage]
    section = config.slurm.model_dump(exclude={"stages"}, exclude_none=True)
    if not distributed:
        section |= ALONE.model_dump(exclude_none=True, exclude_defaults=True)
    own = config.slurm.stages.get(stage)  # pyright: ignore[reportArgumentType]
    section |= own.model_dump(exclude_none=True, exclude_unset=True) if own else {}
    flags = {
        "partition": "partition",
        "account": "account",
        "nodes": "nodes",
        "tasks_per_node": "ntasks-per-node",
        "gpus_per_node": "gpus-per-node",
        "cpus_per_task": "cpus-per-task",
        "time": "time",
    }
    options = [f"--{flags[key]}={section[key]}" for key in flags if key in section]
    bad = [option for option in section["options"] if not option.startswith("-")]
    if bad:
        raise ConfigError(
            f"slurm.options: {bad[0]!r}", "options of sbatch, such as --qos=high", "Correct it."
        )
    return [*options, *section["options"]]


if __name__ == "__main__":
    main()
