"""The plan of a run: its stages in order, their commands, and what identifies their inputs.

With the stages the only code that holds a whole config.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.adapter_files import digest_of_adapter, resolve_adapter_dir
from dpo_dist.config import RunConfig
from dpo_dist.data.keys import Keys
from dpo_dist.manifest import digest_of, is_current, read_manifest
from dpo_dist.model_files import (
    check_named_base,
    digest_of_tokenizer,
    digest_of_weights,
    resolve_model_dir,
)
from dpo_dist.reference_store import ReferenceStore, ScoringContract, open_store
from dpo_dist.run_dir import RunDir

# layout of a pair in a row of tokens -> who sees whom in it
MASK_RULES = {
    "packed": "prompt|chosen causal; rejected sees prompt and itself",
    "padded": "prompt|completion causal",
}


@dataclass(frozen=True)
class Stage:
    """One step of the plan; `distributed` stages run on all ranks, the others on one."""

    name: str
    distributed: bool
    purpose: str


BASE = "base"  # the base model that prepare makes when the config changes the one at model.path
STAGES = (
    Stage("prepare", False, "preference rows -> tokenised pairs"),
    Stage("reference", True, "pairs -> reference log-probs"),
    Stage("train", True, "DPO -> checkpoints, metrics"),
    Stage("export", False, "newest or best checkpoint -> Hugging Face folders"),
    Stage("verify", False, "a fresh load reproduces the probe"),
)
PUSH = Stage("push", False, "verified export -> the Hugging Face Hub")
DOCTOR = Stage("doctor", True, "versions, GPUs, disk and network of the nodes")
EVALUATE = Stage("evaluate", True, "held-out accuracy and margin of the export")
GENERATE = Stage("generate", False, "answers of base and export side by side")


def stage_argv(stage: str, config_path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command of one rank of a stage; its place in the job comes through the environment."""
    return [sys.executable, "-m", "dpo_dist", stage, str(config_path), *overrides]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run; it pushes only when asked."""
    return (*STAGES, *((PUSH,) if config.export.push_to_hub else ()))


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

    Raises ArtefactError when the run's own is not there, or was made with other settings.
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


def _reference_digest(config: RunConfig) -> str:
    if config.reference.model is None:
        return start_digest(config)
    return digest_of_weights(reference_model_dir(config), config.model.allow_pickle_weights)


def store_root(config: RunConfig) -> Path:
    """Folder of the reference store."""
    return config.reference.store_dir or RunDir(config.run.dir).reference_dir


def scoring_contract(config: RunConfig, layout: str) -> ScoringContract:
    """Everything but the token ids that a reference log-prob of this run depends on."""
    rule = MASK_RULES[layout]
    if config.objective.ld_alpha != 1.0:
        rule += f"; tokens past the shorter answer count {config.objective.ld_alpha:g}"
    return ScoringContract(
        reference_digest=_reference_digest(config),
        tokenizer_digest=digest_of_tokenizer(base_model_dir(config)),
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        layout=layout,
        mask_rule=rule,
    )


def complete_store(config: RunConfig, keys: Keys) -> tuple[str, ReferenceStore] | None:
    """(layout, store) that holds every key, or None; no model is loaded to find out."""
    layouts = MASK_RULES if config.model.layout == "auto" else (config.model.layout,)
    for layout in layouts:
        store = open_store(store_root(config), scoring_contract(config, layout))
        if not len(store.coverage(keys)[1]):
            return layout, store
    return None


def scoring_budget(config: RunConfig) -> int:
    """Packed tokens of one forward without gradients: nothing is kept for a backward."""
    return config.reference.micro_batch_tokens or 2 * config.train.micro_batch_tokens


def training_identity(config: RunConfig) -> dict[str, str]:
    """What a resume must find unchanged, one entry a setting so that a difference has a name.

    Memory and speed settings (micro_batch_tokens, sharding, attention, checkpointing, logging)
    are left out: they change no number.
    """
    free = {"micro_batch_tokens", "gradient_checkpointing", "deepspeed"}
    sections = {
        "objective": config.objective.model_dump(mode="json"),
        "train": {k: v for k, v in config.train.model_dump(mode="json").items() if k not in free},
        # of the adapter it starts from the content counts, which is part of the model's digest
        "adapter": config.adapter.model_dump(mode="json", exclude={"path"})
        if config.adapter
        else {"none": True},
        "model": {"dtype": config.model.dtype, "quantization": config.model.quantization},
        "run": {"seed": config.run.seed},
    }
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
