"""A model of published size and a setup of a run, for tests of the planner's arithmetic."""

from typing import Any

from dpo_dist.planning.setup import ModelShape, Setup, sharding_of

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
LLAMA_8B = ModelShape(
    num_parameters=8_030_261_248,
    num_trained=8_030_261_248,
    num_active=7_504_658_432,
    num_layers=32,
    hidden_size=4096,
    query_width=4096,
    key_value_width=1024,
    mlp_width=14336,
    mlp_matrices=3,
    experts_per_token=0,
    norms_per_layer=2,
    vocab_size=128256,
    head_trained=True,
    adapter_ranks=0,
    adapter_inputs=0,
    num_heads=32,
    num_key_value_heads=8,
)


def setup_of(shape: ModelShape, ds_config: dict[str, Any], dtype: str, ranks: int) -> Setup:
    """Full training of `shape` with gradient checkpointing, without evaluation."""
    return Setup(
        shape=shape,
        sharding=sharding_of(ds_config),
        world_size=ranks,
        dtype_bytes=DTYPE_BYTES[dtype],
        micro_batch_tokens=16384,
        scoring_tokens=0,
        logits_per_chunk=2**25,
        checkpointing=True,
    )
