"""The model folders of a run: its base, its starting adapter, its reference."""

from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig
from dpo_dist.model_files.adapter import digest_of_adapter, resolve_adapter_dir
from dpo_dist.model_files.files import check_named_base, digest_of_weights, resolve_model_dir
from dpo_dist.run.manifest import digest_of, is_current, read_manifest
from dpo_dist.run.run_dir import RunDir

BASE = "base"  # the base model that prepare makes when the config changes the one at model.path


def source_model_dir(config: RunConfig) -> Path:
    """Local folder of the model at model.path."""
    model = config.model
    return resolve_model_dir(model.path, model.revision, model.allow_pickle_weights)


def makes_base(config: RunConfig) -> bool:
    """Whether `prepare` makes a base model of this run's own, with more tokens or merged."""
    merges = config.adapter is not None and config.adapter.path and config.adapter.start == "merge"
    return bool(config.model.add_tokens or config.model.pad_vocab_to_multiple or merges)


def base_settings(config: RunConfig) -> dict[str, Any]:
    """What the run's own base model is made with."""
    adapter, model = config.adapter, config.model
    merged = adapter.path if adapter is not None and adapter.start == "merge" else None
    return {
        "model": model.path,
        "add_tokens": list(model.add_tokens),
        "pad_vocab_to_multiple": model.pad_vocab_to_multiple,
        "merged_adapter": merged,
        "dtype": model.dtype if merged is not None else "as stored",
    }


def base_model_dir(config: RunConfig) -> Path:
    """Local folder of the base model: model.path, or what `prepare` made of it.

    Raises ArtifactError when the run's own is not there, or was made with other settings.
    """
    if not makes_base(config):
        return source_model_dir(config)
    folder = RunDir(config.run.dir).base_dir
    is_current(folder, BASE, base_settings(config), read_manifest(folder).inputs)
    return folder


def start_adapter_dir(config: RunConfig) -> Path | None:
    """Local folder of the adapter that the policy continues; None when it starts without one.

    Raises ModelFilesError when there is no such adapter or it names another base model.
    """
    adapter = config.adapter
    if adapter is None or adapter.path is None or adapter.start != "continue":
        return None
    return named_adapter_dir(config)


def named_adapter_dir(config: RunConfig) -> Path:
    """Local folder of adapter.path, which must name model.path as its base."""
    assert config.adapter is not None and config.adapter.path is not None
    folder = resolve_adapter_dir(config.adapter.path)
    check_named_base(folder, config.model.path)
    return folder


def start_digest(config: RunConfig) -> str:
    """Identity of the policy as it starts: the base model's files, and the adapter's if any."""
    base = digest_of_weights(base_model_dir(config), config.model.allow_pickle_weights)
    start = start_adapter_dir(config)
    if start is None:
        return base
    return digest_of({"base": base, "adapter": digest_of_adapter(start)})


def reference_model_dir(config: RunConfig) -> Path:
    """Local folder of the reference model: the policy's base unless the config names another.

    The adapter that the policy continues belongs to the reference too: `reference_adapter_dir`.
    """
    if config.reference.model is None:
        return base_model_dir(config)
    return resolve_model_dir(config.reference.model, allow_pickle=config.model.allow_pickle_weights)


def reference_adapter_dir(config: RunConfig) -> Path | None:
    """The adapter on the reference model: that of the policy's start, none on a named model."""
    return start_adapter_dir(config) if config.reference.model is None else None


def reference_digest(config: RunConfig) -> str:
    """Identity of the reference model, its adapter included."""
    if config.reference.model is None:
        return start_digest(config)
    return digest_of_weights(reference_model_dir(config), config.model.allow_pickle_weights)
