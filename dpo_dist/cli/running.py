"""dpo-dist run, and the commands of single stages."""

from typing import Annotated

import typer

from dpo_dist.cli.arguments import ConfigPath, Overrides
from dpo_dist.cli.output import print_json
from dpo_dist.cli.rank import launch, run_or_launch
from dpo_dist.config.run_config import load_config
from dpo_dist.run import pipeline
from dpo_dist.run.local_ranks import count_workers
from dpo_dist.run.topology import count_places


def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and its cost.")
    ] = False,
) -> None:
    """Run all stages on this machine; what is current is skipped."""
    config = load_config(config_path, overrides or [])
    if dry_run:
        from dpo_dist.commands.plan import print_dry_run

        print_dry_run(config, config_path, overrides or [])
        return
    count_places(count_workers(config.local)[0], config.train.sequence_parallel)  # refuses at once
    for stage in pipeline.stages_of(config):
        code = launch(stage, config, config_path, overrides or [])
        if code:
            raise typer.Exit(code)


def prepare(
    config_path: ConfigPath,
    overrides: Overrides = None,
    preview: Annotated[
        int, typer.Option(help="Show this many rendered pairs and write nothing.")
    ] = 0,
) -> None:
    """Preference rows -> tokenized pairs."""
    if preview:
        from dpo_dist.stages import prepare as stage

        stage.preview(load_config(config_path, overrides or []), preview)
        return
    run_or_launch(pipeline.PREPARE, config_path, overrides or [])


def reference(
    config_path: ConfigPath,
    overrides: Overrides = None,
    status: Annotated[bool, typer.Option("--status", help="Show the store's coverage.")] = False,
) -> None:
    """Pairs -> reference log-probs."""
    if status:
        from dpo_dist.stages import reference as stage

        print_json(stage.status(load_config(config_path, overrides or [])))
        return
    run_or_launch(pipeline.REFERENCE, config_path, overrides or [])


def train(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """DPO -> checkpoints, metrics."""
    run_or_launch(pipeline.TRAIN, config_path, overrides or [])


def export(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Newest or best checkpoint -> Hugging Face folders."""
    run_or_launch(pipeline.EXPORT, config_path, overrides or [])


def verify(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """A fresh load reproduces the probe."""
    run_or_launch(pipeline.VERIFY, config_path, overrides or [])


def push(
    config_path: ConfigPath,
    overrides: Overrides = None,
    what: Annotated[
        str | None, typer.Option(help="full, merged or adapter, as export.hub_folder.")
    ] = None,
) -> None:
    """Verified export -> the Hugging Face Hub (export.push_to_hub)."""
    chosen = [f"export.hub_folder={what}"] if what else []
    run_or_launch(pipeline.PUSH, config_path, [*(overrides or []), *chosen])
