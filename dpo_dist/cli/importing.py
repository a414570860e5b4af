"""dpo-dist import: a YAML of TRL, Axolotl or LlamaFactory becomes a run.yaml."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_dist.errors import ConfigError
from dpo_dist.run.manifest import write_atomic

if TYPE_CHECKING:
    from dpo_dist.commands.import_config import Trainer

Processes = Annotated[
    int | None, typer.Option(min=1, help="GPUs of the file's run; its batch depends on them.")
]
Accelerate = Annotated[Path | None, typer.Option(help="Accelerate's YAML: processes, ZeRO stage.")]
Out = Annotated[Path | None, typer.Option(help="Write here; printed by default.")]
Words = Annotated[
    list[str] | None, typer.Argument(help="Keys of the file's trainer.", metavar="[KEY=VALUE]...")
]


def import_config(
    path: Annotated[
        Path, typer.Argument(help="A YAML for TRL, Axolotl or LlamaFactory.", metavar="FILE")
    ],
    overrides: Words = None,
    num_processes: Processes = None,
    accelerate_config: Accelerate = None,
    out: Out = None,
) -> None:
    """TRL's, Axolotl's or LlamaFactory's YAML -> run.yaml; no key is left out in silence."""
    _import(path, overrides, num_processes, accelerate_config, out, None)


def import_trl(
    path: Annotated[Path, typer.Argument(help="A YAML for TRL's dpo script.", metavar="TRL.YAML")],
    overrides: Words = None,
    num_processes: Processes = None,
    accelerate_config: Accelerate = None,
    out: Out = None,
) -> None:
    """`import` for a file that is known to be TRL's."""
    _import(path, overrides, num_processes, accelerate_config, out, "TRL")


def _import(
    path: Path, overrides: list[str] | None, num_processes: int | None, accelerate: Path | None,
    out: Path | None, trainer: "Trainer | None",
) -> None:  # fmt: skip
    from dpo_dist.commands import import_config as command

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists", "a new file", "Name another, or remove it.")
    imported = command.import_config(path, overrides or [], num_processes, accelerate, trainer)
    if out is None:
        print(imported.text, end="")
    else:
        write_atomic(out, imported.text)
    for line in (imported.arithmetic, *(f"not taken: {note}" for note in imported.differs)):
        print(line, file=sys.stderr)
