"""What a resume must find unchanged in a run config."""

from typing import Any

from dpo_dist.config.run_config import RunConfig

# keys that earlier versions had not: left out while they have the value that does as those did
LATER_KEYS: dict[str, Any] = {
    "data.order": "pairs",
    "train.min_lr_rate": 0.0,
    "train.warmup_steps": None,
    "train.decay_steps": 0.1,
    "train.decay_shape": "cosine",
}


def training_identity(config: RunConfig) -> dict[str, str]:
    """What a resume must find unchanged, one entry per key so that a difference can be named.

    Keys about memory and speed (micro_batch_tokens, sharding, attention, checkpointing, logging)
    are left out, because they change no number.
    """
    free = {
        "micro_batch_tokens", "gradient_checkpointing", "deepspeed", "deterministic",
        "profile_steps", "non_finite", "tiled_mlp", "offload_activations", "sequence_parallel",
    }  # fmt: skip
    sections = {
        "objective": config.objective.model_dump(mode="json"),
        "train": {k: v for k, v in config.train.model_dump(mode="json").items() if k not in free},
        # the adapter that training starts from counts by content, as part of the model's digest
        "adapter": config.adapter.model_dump(mode="json", exclude={"path"})
        if config.adapter
        else {"none": True},
        "model": {"dtype": config.model.dtype, "quantization": config.model.quantization},
        "run": {"seed": config.run.seed},
        "data": {"order": config.data.order},
    }
    named = {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }
    later = {key for key, value in LATER_KEYS.items() if named[key] == value}
    return {key: str(value) for key, value in named.items() if key not in later}
