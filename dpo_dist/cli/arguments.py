"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.config.keys import override_names


def _complete_override(incomplete: str) -> list[str]:
    return [name for name in override_names() if name.startswith(incomplete)]


ConfigPath = Annotated[Path, typer.Argument(help="The run config.", metavar="RUN.YAML")]
OptionalConfigPath = Annotated[Path | None, typer.Argument(metavar="[RUN.YAML]")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="section.key=value", metavar="[SECTION.KEY=VALUE]...",
        autocompletion=_complete_override,
    ),
]  # fmt: skip
RunFolder = Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN_DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
