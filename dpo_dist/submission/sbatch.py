"""Jobs for Slurm: their sizes as options of sbatch, and their submission."""

import shlex
import shutil
import subprocess

from dpo_dist.config.cluster_section import SlurmJobSection
from dpo_dist.config.run_config import RunConfig
from dpo_dist.errors import ClusterError, ConfigError
from dpo_dist.run.pipeline import Stage

# One process on one node, whatever the distributed stages have.
ALONE = SlurmJobSection(nodes=1)  # pyright: ignore[reportCallIssue]
FLAGS = {  # key of the slurm section -> option of sbatch
    "partition": "partition",
    "account": "account",
    "nodes": "nodes",
    "tasks_per_node": "ntasks-per-node",
    "gpus_per_node": "gpus-per-node",
    "cpus_per_task": "cpus-per-task",
    "time": "time",
}


class Submission:
    """Jobs that belong together; a refused one cancels those before it."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run, self.job_ids = dry_run, list[str]()

    def submit(self, what: str, command: list[str], remedy: str) -> str:
        """Submits a job, prints its id and returns it; in a dry run prints the command instead.

        Raises ClusterError when sbatch refuses it.
        """
        if self.dry_run:
            print(shlex.join(command))
            return f"ID_OF_{what.upper()}"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if self.job_ids:
                subprocess.run(["scancel", *self.job_ids], check=False)
            raise ClusterError(
                f"sbatch refuses {what} (exit {done.returncode}: {done.stderr.strip()})",
                "a job that the cluster takes",
                remedy,
            )
        self.job_ids.append(done.stdout.strip().split(";")[0])
        print(f"{what:<10} job {self.job_ids[-1]}", flush=True)
        return self.job_ids[-1]


def check_sbatch() -> None:
    """Raises ClusterError on a machine without Slurm's commands."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "there is no sbatch on PATH",
            "a login node of a Slurm cluster",
            "Submit from there, or look at the jobs with --dry-run; `dpo-dist run` needs no Slurm.",
        )


def job_options(config: RunConfig, stage: Stage) -> list[str]:
    """Options of sbatch for the size of one stage; raises ConfigError for what is none."""
    section = config.slurm.model_dump(exclude={"stages"}, exclude_none=True)
    if not stage.distributed:
        section |= ALONE.model_dump(exclude_none=True, exclude_defaults=True)
    own = config.slurm.stages.get(stage.name)  # pyright: ignore[reportArgumentType]
    section |= own.model_dump(exclude_none=True, exclude_unset=True) if own else {}
    bad = [option for option in section["options"] if not option.startswith("-")]
    if bad:
        raise ConfigError(
            f"slurm.options: {bad[0]!r}", "options of sbatch, such as --qos=high", "Correct it."
        )
    sized = [f"--{FLAGS[key]}={section[key]}" for key in FLAGS if key in section]
    return [*sized, *section["options"]]
