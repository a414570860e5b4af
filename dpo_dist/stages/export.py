"""Newest checkpoint -> Hugging Face folders: `export/full`, or `export/adapter` and `merged`.

1. Take the newest checkpoint that verifies, and see that it belongs to this base model.
2. For each folder: leave it alone when it is current, refuse it when it is stale.
3. Stream the weights; add config, tokenizer, chat template, generation config, model card.
4. The folder appears under its name only when it is whole.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config import RunConfig
from dpo_dist.data.templates import resolve_template
from dpo_dist.engine import export as weights
from dpo_dist.engine.adapters import add_adapter, write_adapter_config
from dpo_dist.engine.base_weights import build_skeleton, open_base
from dpo_dist.engine.checkpoint import newest_committed
from dpo_dist.engine.commit import record_files
from dpo_dist.engine.shards import ShardedCheckpoint, open_checkpoint
from dpo_dist.engine.train_state import TrainState, read_train_state
from dpo_dist.errors import ArtefactError, CheckpointError, ModelFilesError
from dpo_dist.logs import progress_bar
from dpo_dist.manifest import (
    Manifest,
    atomic_dir,
    differences,
    digest_of,
    digest_of_file,
    is_current,
    write_json,
    write_manifest,
)
from dpo_dist.model_card import Kind, Training, base_model_name, model_card, read_metrics
from dpo_dist.model_files import TOKENIZER_FILES, digest_of_weights, read_model_config
from dpo_dist.plan import base_model_dir, training_identity
from dpo_dist.run_dir import MANIFEST_NAME, PAIRS_REPORT_NAME, RunDir
from dpo_dist.stop_flag import StopFlag, Stopped

_logger = logging.getLogger(__name__)
STAGE = "export"
MIB = 1 << 20
TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True)
class Job:
    """What every folder of one export is made from."""

    config: RunConfig
    base_dir: Path
    checkpoint_dir: Path
    state: TrainState
    template: str | None  # chat template of the run, None: the tokenizer's own
    inputs: dict[str, str]
    stop: StopFlag

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.export.dtype)


def run(config: RunConfig) -> Path:
    """Makes the export folders that are not current; returns their parent.

    Raises CheckpointError without a usable checkpoint, ModelFilesError when the base model is not
    the one that was trained, ArtefactError for a stale folder. Raises Stopped on a signal.
    """
    paths = RunDir(config.run.dir)
    job = _open_job(config, paths)
    folders: dict[Kind, Path] = {"full": paths.model_dir(merged=False)}
    if config.adapter is not None:
        folders = {"adapter": paths.adapter_dir}
        if config.export.merge:
            folders["merged"] = paths.model_dir(merged=True)
    for kind, folder in folders.items():
        settings = _settings(job, kind)
        if is_current(folder, STAGE, settings, job.inputs):
            _logger.info("export: %s is current", folder)
            continue
        with atomic_dir(folder) as partial, _named_errors(folder):
            num_bytes, details = _write_folder(job, kind, partial)
            files = {name: asdict(record) for name, record in record_files(partial).items()}
            details |= {"step": job.state.step, "files": files}
            write_manifest(partial, Manifest(STAGE, settings, job.inputs, details))
        _logger.info(
            "export: %s, %.1f MiB of %s from step %d",
            folder, num_bytes / MIB, config.export.dtype, job.state.step,
        )  # fmt: skip
    return paths.export_dir
