"""What an export is made from: a checkpoint that verifies, and the base model it belongs to."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.tokens.templates import resolve_template
from dpo_dist.engine.checkpoints.train_state import TrainState, read_train_state
from dpo_dist.engine.weights.base_weights import StoredModel, open_base
from dpo_dist.errors import CheckpointError, ModelFilesError
from dpo_dist.exporting.choice import choose_checkpoint
from dpo_dist.inputs.work import check_tokenizer
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.exports import ExportKind
from dpo_dist.run.manifest import differences, digest_of, digest_of_file
from dpo_dist.run.run_dir import MANIFEST_NAME, RunDir
from dpo_dist.run.stop_flag import StopFlag


@dataclass(frozen=True)
class ExportJob:
    """What every folder of one export is made from."""

    models: RunModels
    checkpoint_dir: Path
    state: TrainState
    template: str | None  # chat template of the run, None: the tokenizer's own
    inputs: dict[str, str]
    stop: StopFlag

    @property
    def config(self) -> RunConfig:
        return self.models.config

    @property
    def paths(self) -> RunDir:
        return RunDir(self.config.run.dir)

    @cached_property
    def stored_base(self) -> StoredModel:
        """The base model's headers, which only a whole model needs."""
        return open_base(self.models.base, self.config.model.trust_remote_code)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the whole model's weights; None: each as the base has it."""
        name = self.config.export.dtype
        return None if name == "auto" else getattr(torch, name)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Of an adapter, which no base stores: as it was trained."""
        return self.dtype or getattr(torch, self.config.model.dtype)

    def dtype_name(self, kind: ExportKind) -> str:
        """What card and config.json say: under auto, the type of most of the bytes."""
        dtype = self.adapter_dtype
        if self.dtype is None and kind != "adapter":
            dtype = self.stored_base.main_dtype
        return str(dtype).removeprefix("torch.")

    def settings(self, kind: ExportKind) -> dict[str, Any]:
        """What a folder is made with, for its manifest."""
        export = self.config.export
        settings: dict[str, Any] = {"kind": kind, "dtype": export.dtype}
        if export.base_model is not None:
            settings["base_model"] = export.base_model
        if kind != "adapter":
            settings["max_shard_size_mib"] = export.max_shard_size_mib
        return settings


def open_job(models: RunModels) -> ExportJob:
    """Chooses the checkpoint and checks it; signals set the job's stop flag from here on.

    Raises CheckpointError without a usable checkpoint, ModelFilesError when the base model is not
    the one that was trained, ArtifactError when its tokenizer isn't.
    """
    checkpoint_dir = choose_checkpoint(models.config)
    state = read_train_state(checkpoint_dir)
    _check_trained_here(models, checkpoint_dir, state)
    check_tokenizer(models)
    template = resolve_template(models.config.data.chat_template)
    inputs = {
        "checkpoint": digest_of_file(checkpoint_dir / MANIFEST_NAME),
        "base_model": models.start_digest,
        **({"chat_template": digest_of(template)} if template is not None else {}),
    }
    return ExportJob(models, checkpoint_dir, state, template, inputs, StopFlag().install())


def _check_trained_here(models: RunModels, checkpoint_dir: Path, state: TrainState) -> None:
    """Raises unless the checkpoint was trained from these base weights with this adapter.

    Neither shows in names and shapes: another base or alpha would be merged without a word.
    """
    if state.digests.get("model") != models.start_digest:
        raise ModelFilesError(
            f"{checkpoint_dir} was trained from other weights than {models.base} holds now "
            f"(digest {str(state.digests.get('model'))[:12]}, here {models.start_digest[:12]})",
            "the base model of the run",
            "Set model.path, model.revision and adapter.path to it, or restore its files.",
        )
    trained, now = (
        {key: value for key, value in settings.items() if key.startswith("adapter.")}
        for settings in (state.digests, training_identity(models.config))
    )
    if found := differences(trained, now):
        raise CheckpointError(
            f"{checkpoint_dir} was trained with another adapter ({'; '.join(found)})",
            "the adapter section of this run config",
            "Put these keys back.",
        )
