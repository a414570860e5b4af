"""The scoring contract and the reference store of a run."""

from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.model_files.files import digest_of_tokenizer
from dpo_dist.model_files.of_run import base_model_dir, reference_digest
from dpo_dist.reference.pair_key import Keys
from dpo_dist.reference.store import ReferenceStore, ScoringContract, open_store
from dpo_dist.run.run_dir import RunDir

# layout of a pair in a row of tokens -> who sees whom in it
MASK_RULES = {
    "packed": "prompt|chosen causal; rejected sees prompt and itself",
    "padded": "prompt|completion causal",
}


def store_root(config: RunConfig) -> Path:
    """Folder of the reference store."""
    return config.reference.store_dir or RunDir(config.run.dir).reference_dir


def scoring_contract(config: RunConfig, layout: str) -> ScoringContract:
    """Everything but the token ids that a reference log-prob of this run depends on."""
    rule = MASK_RULES[layout]
    if config.objective.ld_alpha != 1.0:
        rule += f"; tokens past the shorter answer count {config.objective.ld_alpha:g}"
    return ScoringContract(
        reference_digest=reference_digest(config),
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
