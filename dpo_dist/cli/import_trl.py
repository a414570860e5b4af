"""dpo-dist import-trl: a YAML for TRL becomes a run.yaml."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.errors import ConfigError
from dpo_dist.run.manifest import write_atomic


def import_trl(
    path: Annotated[Path, typer.Argument(help="A YAML for TRL's dpo script.", metavar="TRL.YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of TRL.", metavar="[KEY=VALUE]...")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the TRL run; its batch depends on them.")
    ] = None,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="Accelerate's YAML: processes, ZeRO stage.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write here; printed by default.")] = None,
) -> None:
    """TRL's DPOConfig YAML -> run.yaml; every key taken, or listed with what to do instead."""
    from dpo_dist.trl_import import run_yaml

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists", "a new file", "Name another, or remove it.")
    imported = run_yaml.import_trl(path, overrides or [], num_processes, accelerate_config)
    if out is None:
        print(imported.text, end="")
    else:
        write_atomic(out, imported.text)
    for line in (imported.arithmetic, *(f"not taken: {note}" for note in imported.differs)):
        print(line, file=sys.stderr)
