"""The models of a run: its base, the adapter that it starts from, its reference."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.model_files.adapter import digest_of_adapter, resolve_adapter_dir
from dpo_dist.model_files.files import (
    check_named_base,
    digest_of_tokenizer,
    digest_of_weights,
    resolve_model_dir,
)
from dpo_dist.run.manifest import digest_of, is_current, read_manifest
from dpo_dist.run.run_dir import RunDir

BASE = "base"  # the base model that prepare makes when the config changes the one at model.path


@dataclass(frozen=True)
class RunModels:
    """Where the models of a run lie and what identifies them; each is looked up once, when asked.

    A stage makes one and hands it on. Looking up raises ModelFilesError for a model or adapter that
    is not there or not usable, and ArtifactError when the run's own base is missing or stale.
    """

    config: RunConfig

    @cached_property
    def source(self) -> Path:
        """Local folder of the model at model.path."""
        model = self.config.model
        return resolve_model_dir(model.path, model.revision, model.allow_pickle_weights)

    @cached_property
    def base(self) -> Path:
        """Local folder of the base model: model.path, or what `prepare` made of it."""
        if not makes_base(self.config):
            return self.source
        folder = RunDir(self.config.run.dir).base_dir
        is_current(folder, BASE, base_settings(self.config), read_manifest(folder).inputs)
        return folder

    @cached_property
    def named_adapter(self) -> Path | None:
        """Local folder of adapter.path, which must name model.path as its base."""
        adapter = self.config.adapter
        if adapter is None or adapter.path is None:
            return None
        folder = resolve_adapter_dir(adapter.path)
        check_named_base(folder, self.config.model.path)
        return folder

    @property
    def start_adapter(self) -> Path | None:
        """The adapter that the policy continues; None when it starts without one."""
        adapter = self.config.adapter
        return self.named_adapter if adapter is not None and adapter.start == "continue" else None

    @property
    def start_section(self) -> AdapterSection | None:
        """The adapter's settings where the policy continues one, for loading what it started as."""
        return None if self.start_adapter is None else self.config.adapter

    @cached_property
    def reference(self) -> Path:
        """Local folder of the reference model: the base unless the config names another."""
        named, model = self.config.reference.model, self.config.model
        if named is None:
            return self.base
        return resolve_model_dir(named, allow_pickle=model.allow_pickle_weights)

    @property
    def reference_adapter(self) -> Path | None:
        """The adapter on the reference: that of the policy's start, none on a named model."""
        return self.start_adapter if self.config.reference.model is None else None

    @cached_property
    def start_digest(self) -> str:
        """Identity of the policy as it starts: the base model's files, and the adapter's if any."""
        base = digest_of_weights(self.base, self.config.model.allow_pickle_weights)
        if self.start_adapter is None:
            return base
        return digest_of({"base": base, "adapter": digest_of_adapter(self.start_adapter)})

    @cached_property
    def reference_digest(self) -> str:
        """Identity of the reference, its adapter included."""
        if self.config.reference.model is None:
            return self.start_digest
        return digest_of_weights(self.reference, self.config.model.allow_pickle_weights)

    @cached_property
    def tokenizer_digest(self) -> str:
        """Identity of the base model's tokenizer."""
        return digest_of_tokenizer(self.base)


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
