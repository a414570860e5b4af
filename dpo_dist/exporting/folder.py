"""One export folder: weights, and what a user of them needs beside."""

import json
from pathlib import Path

from dpo_dist.engine.checkpoints.commit import record_files
from dpo_dist.exporting.job import ExportJob
from dpo_dist.exporting.weights import write_weights
from dpo_dist.metrics.curves import QUALITY_PLOTS
from dpo_dist.metrics.writer import read_lines
from dpo_dist.model_files.files import BESIDE_TOKENIZER, TOKENIZER_FILES, copy_files
from dpo_dist.report.charts import write_pictures
from dpo_dist.report.model_card import Training, model_card
from dpo_dist.run.exports import ExportKind
from dpo_dist.run.manifest import FileRecord, write_json
from dpo_dist.run.run_dir import PAIRS_REPORT_NAME

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
CARD_NAME = "README.md"
PLOTS_NAME = "plots"


def write_folder(job: ExportJob, kind: ExportKind, folder: Path) -> dict[str, FileRecord]:
    """Writes everything of one folder but its manifest; the records of all its files."""
    weights = write_weights(job, kind, folder)
    copy_tokenizer(job.models.base, folder, job.template)
    _write_card(job, kind, folder)
    return record_files(folder, weights)


def copy_tokenizer(base_dir: Path, folder: Path, template: str | None) -> None:
    """The base model's tokenizer; a `template` of the run stands in for all that it has."""
    copied = (*TOKENIZER_FILES, *BESIDE_TOKENIZER)
    if template is None:
        copy_files(base_dir, folder, copied)
        return
    copy_files(base_dir, folder, [name for name in copied if "chat_template" not in name])
    (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")
    config_path = folder / TOKENIZER_CONFIG_NAME
    if config_path.is_file():
        settings = json.loads(config_path.read_text())
        settings.pop("chat_template", None)
        write_json(config_path, settings)


def _write_card(job: ExportJob, kind: ExportKind, folder: Path) -> None:
    """The model card with its plots, of the metrics up to the exported step."""
    metrics = read_lines(job.paths.metrics_path, job.state.step)
    pictures = write_pictures(metrics, QUALITY_PLOTS, folder / PLOTS_NAME)
    training = Training(
        job.state.step,
        job.state.epoch,
        job.state.versions,
        json.loads((job.paths.pairs_dir / PAIRS_REPORT_NAME).read_text()),
        metrics,
        {title: f"{PLOTS_NAME}/{name}" for title, name in pictures.items()},
    )
    card = model_card(job.config, kind, job.dtype_name(kind), training)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
