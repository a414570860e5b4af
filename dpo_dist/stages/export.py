"""A checkpoint -> Hugging Face folders: `export/full`, or `export/adapter` and `merged`.

1. Take the newest or the best checkpoint that verifies; see that it belongs to this base model.
2. For each folder: leave it alone when it is current, refuse it when it is stale.
3. Stream the weights; add config, tokenizer, chat template, generation config, model card.
4. The folder appears under its name only when it is whole.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.tokens.templates import resolve_template
from dpo_dist.engine.checkpoints.checkpoint import newest_committed
from dpo_dist.engine.checkpoints.commit import record_files
from dpo_dist.engine.checkpoints.retention import best_committed
from dpo_dist.engine.checkpoints.shard_reader import ShardedCheckpoint, open_checkpoint
from dpo_dist.engine.checkpoints.train_state import TrainState, read_train_state
from dpo_dist.engine.export import weight_writer as weights
from dpo_dist.engine.export.weight_changes import adapter_changes, check_adapter, full_changes
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.weights.base_weights import build_skeleton, open_base
from dpo_dist.errors import ArtifactError, CheckpointError, ModelFilesError
from dpo_dist.metrics.curves import QUALITY_PLOTS
from dpo_dist.metrics.evaluations import ranked_steps
from dpo_dist.metrics.writer import read_lines
from dpo_dist.model_files.files import (
    CONFIG_NAME,
    TOKENIZER_FILES,
    model_config,
    read_model_config,
)
from dpo_dist.model_files.of_run import base_model_dir, makes_base, start_adapter_dir, start_digest
from dpo_dist.report.model_card import Training, model_card
from dpo_dist.report.plots import draw_plots, plot_path
from dpo_dist.run.exports import Kind, export_folders
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import (
    Manifest,
    atomic_dir,
    differences,
    digest_of,
    digest_of_file,
    is_current,
    write_json,
    write_manifest,
)
from dpo_dist.run.run_dir import MANIFEST_NAME, PAIRS_REPORT_NAME, RunDir
from dpo_dist.run.stop_flag import StopFlag, Stopped

_logger = logging.getLogger(__name__)
STAGE = "export"
MIB = 1 << 20
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
PLOTS_NAME = "plots"


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
    def dtype(self) -> torch.dtype | None:
        """Of the whole model's weights; None: each as the base has it."""
        return (
            None if self.config.export.dtype == "auto" else getattr(torch, self.config.export.dtype)
        )

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Of an adapter, which no base stores: as it was trained."""
        return self.dtype or getattr(torch, self.config.model.dtype)


def run(config: RunConfig) -> Path:
    """Makes the export folders that are not current; returns their parent.

    Raises CheckpointError without a usable checkpoint, ModelFilesError when the base model is not
    the one that was trained, ArtifactError for a stale folder. Raises Stopped on a signal.
    """
    paths = RunDir(config.run.dir)
    job = _open_job(config, paths)
    for kind, folder in export_folders(config).items():
        settings = _settings(job, kind)
        if is_current(folder, STAGE, settings, job.inputs):
            _logger.info("export: %s is current", folder)
            continue
        with _named_errors(folder), atomic_dir(folder) as partial:
            _write_folder(job, kind, partial)
            files = record_files(partial)
            details = {
                "step": job.state.step,
                "files": {name: asdict(record) for name, record in files.items()},
            }
            write_manifest(partial, Manifest(STAGE, settings, job.inputs, details))
        _logger.info(
            "export: %s, %.1f MiB as %s from step %d",
            folder, sum(record.size for record in files.values()) / MIB, config.export.dtype,
            job.state.step,
        )  # fmt: skip
    return paths.export_dir


def _open_job(config: RunConfig, paths: RunDir) -> Job:
    base_dir = base_model_dir(config)
    checkpoint_dir = _choose_checkpoint(config, paths)
    state = read_train_state(checkpoint_dir)
    base_digest = start_digest(config)
    _check_trained_here(config, base_dir, base_digest, checkpoint_dir, state)
    template = resolve_template(config.data.chat_template)
    inputs = {
        "checkpoint": digest_of_file(checkpoint_dir / MANIFEST_NAME),
        "base_model": base_digest,
        **({"chat_template": digest_of(template)} if template is not None else {}),
    }
    stop = StopFlag().install()
    return Job(config, base_dir, checkpoint_dir, state, template, inputs, stop)


def _choose_checkpoint(config: RunConfig, paths: RunDir) -> Path:
    """The newest checkpoint that verifies, or the best one by the newest one's evaluations."""
    newest = newest_committed(paths.checkpoints_dir)
    if newest is None:
        raise CheckpointError(
            f"{paths.checkpoints_dir} holds no committed checkpoint",
            "one to export",
            "Run `dpo-dist train` first.",
        )
    best_by = config.checkpoint.best_by
    if best_by is None or config.export.checkpoint == "newest":
        return newest
    ranked = ranked_steps(read_train_state(newest).evaluations, best_by)
    best = best_committed(paths.checkpoints_dir, ranked)
    if best is None:
        raise CheckpointError(
            f"{paths.checkpoints_dir} holds no checkpoint with an evaluation by {best_by}",
            "one to compare",
            "Set export.checkpoint to newest.",
        )
    _logger.info("export: %s, best of %d evaluations by %s", best, len(ranked), best_by)
    return best


def _check_trained_here(
    config: RunConfig, base_dir: Path, base_digest: str, checkpoint_dir: Path, state: TrainState
) -> None:
    """Raises unless the checkpoint was trained from these base weights with this adapter.

    Neither shows in names and shapes: another base or alpha would be merged without a word.
    """
    if state.digests.get("model") != base_digest:
        raise ModelFilesError(
            f"{checkpoint_dir} was trained from other weights than {base_dir} holds now "
            f"(digest {str(state.digests.get('model'))[:12]}, here {base_digest[:12]})",
            "the base model of the run",
            "Set model.path, model.revision and adapter.path to it, or restore its files.",
        )
    trained, now = (
        {key: value for key, value in settings.items() if key.startswith("adapter.")}
        for settings in (state.digests, training_identity(config))
    )
    if found := differences(trained, now):
        raise CheckpointError(
            f"{checkpoint_dir} was trained with another adapter ({'; '.join(found)})",
            "the adapter section of this run config",
            "Put these keys back.",
        )


def _settings(job: Job, kind: Kind) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": kind, "dtype": job.config.export.dtype}
    if job.config.export.base_model is not None:
        settings["base_model"] = job.config.export.base_model
    if kind != "adapter":
        settings["max_shard_size_mib"] = job.config.export.max_shard_size_mib
    return settings


def _write_folder(job: Job, kind: Kind, folder: Path) -> None:
    """Everything of one folder but its manifest."""
    with open_checkpoint(job.checkpoint_dir, verified=True) as trained:
        if kind == "adapter":
            _write_adapter(job, trained, folder)
        else:
            _write_model(job, trained, folder)
    _copy_tokenizer(job.base_dir, folder, job.template)
    paths = RunDir(job.config.run.dir)
    metrics = read_lines(paths.metrics_path, job.state.step)
    plots = draw_plots(metrics, QUALITY_PLOTS, folder / PLOTS_NAME)
    training = Training(
        job.state.step,
        job.state.epoch,
        job.state.versions,
        json.loads((paths.pairs_dir / PAIRS_REPORT_NAME).read_text()),
        metrics,
        {plot.title: plot_path(Path(PLOTS_NAME), plot).as_posix() for plot in plots},
    )
    card = model_card(job.config, kind, _dtype_name(job, kind), training)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_adapter(job: Job, trained: ShardedCheckpoint, folder: Path) -> None:
    policy = _adapted_skeleton(job)
    check_adapter(policy, trained)
    num_elements = sum(math.prod(shape) for shape in trained.names_and_shapes.values())
    with _progress(job, folder, "adapter", num_elements * job.adapter_dtype.itemsize) as advance:
        weights.write_adapter(policy, trained, folder, job.adapter_dtype, advance)
    model = job.config.model
    local = makes_base(job.config) or Path(model.path).expanduser().exists()
    name, revision = (str(job.base_dir), None) if local else (model.path, model.revision)
    base_name = job.config.export.base_model or name
    weights.write_adapter_settings(policy, folder, base_name, revision)


def _write_model(job: Job, trained: ShardedCheckpoint, folder: Path) -> None:
    export, model = job.config.export, job.config.model
    base = open_base(job.base_dir, model.trust_remote_code)
    if job.config.adapter is None:
        changes = full_changes(base, trained)
    else:
        changes = adapter_changes(base, _adapted_skeleton(job), trained)
    plan = weights.plan_model(base, changes, job.dtype)
    with _progress(job, folder, "model", plan.num_bytes) as advance:
        weights.write_model(plan, trained, folder, export.max_shard_size_mib * MIB, advance)
    config = model_config(
        read_model_config(job.base_dir), _dtype_name(job, "full"), plan.breaks_ties
    )
    write_json(folder / CONFIG_NAME, config)
    patterns = [GENERATION_CONFIG_NAME, *(["*.py"] if model.trust_remote_code else [])]
    for pattern in patterns:
        for path in sorted(job.base_dir.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


def _dtype_name(job: Job, kind: Kind) -> str:
    """What card and config.json say: under auto, of most of the bytes."""
    dtype = job.adapter_dtype
    if job.dtype is None and kind != "adapter":
        dtype = open_base(job.base_dir, job.config.model.trust_remote_code).main_dtype
    return str(dtype).removeprefix("torch.")


def _adapted_skeleton(job: Job) -> Any:
    adapter, model = job.config.adapter, job.config.model
    assert adapter is not None, "the run trains all parameters"
    skeleton = build_skeleton(job.base_dir, model.trust_remote_code)
    return add_adapter(skeleton, adapter, str(job.base_dir), start_adapter_dir(job.config))


@contextlib.contextmanager
def _progress(job: Job, folder: Path, what: str, num_bytes: int) -> Iterator[weights.Advance]:
    """A bar over the bytes to write, if the disk has room for them; stops at a signal."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ArtifactError(
            f"{folder.parent} has {free / MIB:,.0f} MiB free",
            f"{num_bytes / MIB:,.0f} MiB for the exported {what}",
            "Free some space, or choose export.dtype=bfloat16.",
        )
    with progress_bar("MiB") as bar:
        task = bar.add_task(f"export {what}", total=num_bytes / MIB)

        def advance(written: int) -> None:
            bar.advance(task, written / MIB)
            if job.stop:
                raise Stopped(f"export stopped by {job.stop.signal_name}")

        yield advance


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a word for the user."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} could not be written ({error.strerror or error})",
            "a writable folder with free space",
            "Fix this and run `dpo-dist export` again; nothing half-written is left.",
        ) from error


def _copy_tokenizer(base_dir: Path, folder: Path, template: str | None) -> None:
    """The base model's tokenizer, with the chat template that the run was trained with."""
    for name in TOKENIZER_FILES:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, folder / name)
    if template is None:
        return
    (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")
    config_path = folder / TOKENIZER_CONFIG_NAME
    settings = json.loads(config_path.read_text())
    settings.pop("chat_template", None)
    write_json(config_path, settings)
