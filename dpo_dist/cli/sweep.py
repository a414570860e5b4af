"""dpo-dist sweep: several runs, on this machine or handed to a cluster."""

from typing import Annotated

import typer

from dpo_dist.cli.arguments import ConfigPath, Overrides
from dpo_dist.errors import ConfigError


def sweep(
    config_path: ConfigPath,
    overrides: Overrides = None,
    train_only: Annotated[
        bool, typer.Option("--train-only", help="End each point after training: no export.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Only show what there is so far.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it as an array of jobs.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Submit each point as a Ray job.")] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Points at the same time, on a cluster.")
    ] = None,
) -> None:
    """A run for every combination of values such as objective.beta=0.05,0.1; one reference pass."""
    from dpo_dist.cli import local_sweep
    from dpo_dist.submission import ray_sweep, slurm_sweep
    from dpo_dist.sweeps.points import plan_sweep

    _check_scheduler(slurm, ray, at_once)
    planned = plan_sweep(config_path, overrides or [], train_only=train_only)
    if table and not dry_run:
        raise typer.Exit(local_sweep.show_sweep(planned))
    if slurm:
        slurm_sweep.submit(planned, config_path, overrides or [], at_once, dry_run)
    elif ray:
        ray_sweep.submit(planned, config_path, at_once or 1, dry_run)
        if not dry_run:
            raise typer.Exit(local_sweep.show_sweep(planned))
    elif dry_run:
        local_sweep.print_commands(planned, config_path)
    else:
        raise typer.Exit(local_sweep.run_sweep(planned, config_path))


def _check_scheduler(slurm: bool, ray: bool, at_once: int | None) -> None:
    """Raises ConfigError for options that contradict each other."""
    if slurm and ray:
        raise ConfigError("--slurm and --ray", "one scheduler", "Leave one of them out.")
    if at_once is not None and not (slurm or ray):
        raise ConfigError(
            f"--at-once {at_once} without --slurm or --ray",
            "a cluster, since the points of one machine share it",
            "Name the scheduler, or leave it out: here they run one after the other.",
        )
