"""A checkpoint -> Hugging Face folders: `export/full`, or `export/adapter` and `merged`.

1. Take the newest or the best checkpoint that verifies; see that it belongs to this base model.
2. For each folder: leave it alone when it is current, refuse it when it is stale.
3. Stream the weights; add config, tokenizer, chat template, generation config, model card.
4. The folder appears under its name only when it is whole.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.errors import ArtifactError, disk_errors_as
from dpo_dist.exporting.folder import write_folder
from dpo_dist.exporting.job import ExportJob, open_job
from dpo_dist.exporting.weights import MIB
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.exports import ExportKind, export_folders
from dpo_dist.run.manifest import FileRecord, Manifest, atomic_dir, is_current, write_manifest
from dpo_dist.watch.heartbeat import during

_logger = logging.getLogger(__name__)
STAGE = "export"


@during("export")
def run(config: RunConfig) -> Path:
    """Makes the export folders that are not current; returns their parent.

    Raises CheckpointError without a usable checkpoint, ModelFilesError when the base model is not
    the one that was trained, ArtifactError for a stale folder or one that cannot be written.
    Raises Stopped on a signal.
    """
    job = open_job(RunModels(config))
    for kind, folder in export_folders(config).items():
        if is_current(folder, STAGE, job.settings(kind), job.inputs):
            _logger.info("export: %s is current", folder)
            continue
        unwritten = disk_errors_as(
            ArtifactError,
            f"{folder} could not be written",
            "a writable folder with free space",
            "Fix this and run `dpo-dist export` again; nothing half-written is left.",
        )
        with unwritten, atomic_dir(folder) as partial:
            files = write_folder(job, kind, partial)
            write_manifest(partial, _manifest(job, kind, files))
        size, step = sum(record.size for record in files.values()) / MIB, job.state.step
        _logger.info(
            "export: %s, %.1f MiB as %s from step %d", folder, size, config.export.dtype, step
        )
    return job.paths.export_dir


def _manifest(job: ExportJob, kind: ExportKind, files: Mapping[str, FileRecord]) -> Manifest:
    records = {name: asdict(record) for name, record in files.items()}
    details = {"step": job.state.step, "files": records}
    return Manifest(STAGE, job.settings(kind), job.inputs, details)
