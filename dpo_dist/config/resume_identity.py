"""What a resume must find unchanged in a run config."""

from dpo_dist.config.run_config import RunConfig


def training_identity(config: RunConfig) -> dict[str, str]:
    """What a resume must find unchanged, one entry per key so that a difference can be named.

    Keys about memory and speed (micro_batch_tokens, sharding, attention, checkpointing, logging)
    are left out, because they change no number.
    """
    free = {
        "micro_batch_tokens", "gradient_checkpointing", "deepspeed", "deterministic",
        "profile_steps", "non_finite",
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
    }
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
