"""The folders that an export of a run makes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from dpo_dist.config.run_config import RunConfig
from dpo_dist.run.manifest import FileRecord
from dpo_dist.run.run_dir import RunDir

ExportKind = Literal["adapter", "merged", "full"]


class ExportDetails(BaseModel):
    """What the manifest of an export says of it."""

    step: int
    files: dict[str, FileRecord]


def export_folders(config: RunConfig) -> dict[ExportKind, Path]:
    """The folders that an export of this run makes, each with its card."""
    paths = RunDir(config.run.dir)
    if config.adapter is None:
        return {"full": paths.model_dir(merged=False)}
    merged: dict[ExportKind, Path] = {"merged": paths.model_dir(merged=True)}
    return {"adapter": paths.adapter_dir, **(merged if config.export.merge else {})}


def pushed_kind(config: RunConfig) -> ExportKind:
    """The whole model unless the config names a folder or there is only an adapter."""
    asked = config.export.hub_folder
    return list(export_folders(config))[-1] if asked == "auto" else asked
