"""Submit a run as a chain of Slurm jobs, a job a stage, each with its own nodes, GPUs and time.

    python launch/slurm_launcher.py run.yaml [section.key=value ...] [--dry-run]

Sizes come from the `slurm:` section of the run config: its keys hold for every job, those under
`slurm.stages.NAME` for one. A job starts when the one before it has ended well, and is cancelled
when that failed. Everything else is slurm/dpo.sh, which every job runs for its stage alone.
"""

from typing import Annotated

import typer
from command_line import ConfigPath, Overrides, start

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.run.pipeline import DOCTOR, Stage, stages_of
from dpo_dist.submission.programs import program
from dpo_dist.submission.sbatch import Submission, check_sbatch, job_options

SCRIPT = program("slurm/dpo.sh")


def main(
    config_path: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Submit a run as a chain of Slurm jobs, a job a stage, of the sizes in its slurm section."""
    config = load_config(config_path, overrides or [])
    # Made first: a bad one is refused before anything is submitted.
    sizes = {stage: job_options(config, stage) for stage in (DOCTOR, *stages_of(config))}
    if not dry_run:
        check_sbatch()
    arguments = [str(config_path), *(overrides or [])]
    jobs, before = Submission(dry_run), None
    for stage, size in sizes.items():
        command = sbatch_command(config, stage, size, before, arguments)
        remedy = f"Correct slurm or slurm.stages.{stage.name}; nothing of this chain runs."
        before = jobs.submit(stage.name, command, remedy)
    if dry_run:
        print(f"\n# {SCRIPT}\n{SCRIPT.read_text()}", end="")


def sbatch_command(
    config: RunConfig, stage: Stage, size: list[str], before: str | None, arguments: list[str]
) -> list[str]:
    """The sbatch command of one stage, whose job waits for the one `before`."""
    after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
    return [
        "sbatch", "--parsable", f"--job-name={config.run.dir.name}-{stage.name}",
        f"--export=ALL,DPO_STAGES={stage.name}", *after, *size, str(SCRIPT), *arguments,
    ]  # fmt: skip


if __name__ == "__main__":
    start(main)
