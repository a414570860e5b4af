"""The scoring contract and the reference store of a run."""

from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.model_files.of_run import RunModels
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


def scoring_contract(models: RunModels, layout: str) -> ScoringContract:
    """Everything but the token ids that a reference log-prob of this run depends on."""
    config, rule = models.config, MASK_RULES[layout]
    if config.objective.ld_alpha != 1.0:
        rule += f"; tokens past the shorter answer count {config.objective.ld_alpha:g}"
    return ScoringContract(
        reference_digest=models.reference_digest,
        tokenizer_digest=models.tokenizer_digest,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        layout=layout,
        mask_rule=rule,
    )


def complete_store(models: RunModels, keys: Keys) -> tuple[str, ReferenceStore] | None:
    """(layout, store) that holds every key, or None; no model is loaded to find out."""
    chosen = models.config.model.layout
    for layout in MASK_RULES if chosen == "auto" else (chosen,):
        store = open_store(store_root(models.config), scoring_contract(models, layout))
        if not len(store.coverage(keys)[1]):
            return layout, store
    return None
