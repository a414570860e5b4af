"""The plan of a run: its stages in order, their commands, and what identifies their inputs.

With the stages the only code that holds a whole config.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config import RunConfig
from dpo_dist.data.keys import Keys
from dpo_dist.model_files import digest_of_tokenizer, digest_of_weights, resolve_model_dir
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


STAGES = (
    Stage("prepare", False, "preference rows -> tokenised pairs"),
    Stage("reference", True, "pairs -> reference log-probs"),
    Stage("train", True, "DPO -> checkpoints, metrics"),
    Stage("export", False, "newest or best checkpoint -> Hugging Face folders"),
    Stage("verify", False, "a fresh load reproduces the probe"),
)
DOCTOR = Stage("doctor", True, "versions, GPUs, disk and network of the nodes")
EVALUATE = Stage("evaluate", True, "held-out accuracy and margin of the export")
GENERATE = Stage("generate", False, "answers of base and export side by side")


def stage_argv(stage: str, config_path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command of one rank of a stage; its place in the job comes through the environment."""
    return [sys.executable, "-m", "dpo_dist", stage, str(config_path), *overrides]


def base_model_dir(config: RunConfig) -> Path:
    """Local folder of the base model."""
    model = config.model
    return resolve_model_dir(model.path, model.revision, model.allow_pickle_weights)


def reference_model_dir(config: RunConfig) -> Path:
    """Local folder of the reference: the policy as it starts unless the config names another."""
    if config.reference.model is None:
        return base_model_dir(config)
    return resolve_model_dir(config.reference.model, allow_pickle=config.model.allow_pickle_weights)


def store_root(config: RunConfig) -> Path:
    """Folder of the reference store."""
    return config.reference.store_dir or RunDir(config.run.dir).reference_dir


def scoring_contract(config: RunConfig, layout: str) -> ScoringContract:
    """Everything but the token ids that a reference log-prob of this run depends on."""
    reference_dir = reference_model_dir(config)
    rule = MASK_RULES[layout]
    if config.objective.ld_alpha != 1.0:
        rule += f"; tokens past the shorter answer count {config.objective.ld_alpha:g}"
    return ScoringContract(
        reference_digest=digest_of_weights(reference_dir, config.model.allow_pickle_weights),
        tokenizer_digest=digest_of_tokenizer(base_model_dir(config)),
        dtype=config.model.dtype,
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
        "adapter": config.adapter.model_dump(mode="json") if config.adapter else {"none": True},
        "model": {"dtype": config.model.dtype},
        "run": {"seed": config.run.seed},
    }
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
