"""What the arithmetic of the planner starts from: a model, its sharding, a run and its pairs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LOGITS_PER_CHUNK = 2**25  # LOGITS_BUDGET of dpo_dist/objective/logprobs.py, which needs torch


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model, with its adapter, that memory and work depend on."""

    num_parameters: int
    num_trained: int
    num_active: int  # elements of the matrices that a token is multiplied with
    num_layers: int
    hidden_size: int
    query_width: int  # heads x head size
    key_value_width: int
    mlp_width: int  # of all experts of a token together
    mlp_matrices: int  # 3 with a gate, else 2
    experts_per_token: int  # 0 without experts
    norms_per_layer: int
    vocab_size: int
    head_trained: bool
    adapter_ranks: int  # ranks of a layer's adapters, summed
    adapter_inputs: int  # widths of their inputs, summed
    num_quantized: int = 0  # of num_parameters, those held in NF4
    largest_quantized: int = 0  # of one linear layer
    num_factors: int = 0  # rows and columns of the trained matrices, which Adafactor keeps
    num_without_muon: int = 0  # of num_trained, what Muon leaves to AdamW
    num_heads: int = 0  # of a layer's attention; 0 where it has none that ranks could share
    num_key_value_heads: int = 0
    num_experts: int = 0  # of a layer
    num_in_experts: int = 0  # elements of all experts' matrices

    @property
    def num_head(self) -> int:
        """Elements of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_mlp(self) -> int:
        """Elements of a layer's dense MLP, its adapters aside; 0 with experts."""
        return (
            0 if self.experts_per_token else (self.mlp_matrices * self.mlp_width * self.hidden_size)
        )

    def num_held(self, dtype_bytes: int) -> int:
        """Elements of dtype in memory: two NF4 weights are packed into each byte of them."""
        packed = self.num_quantized // (2 * dtype_bytes)
        return self.num_parameters - self.num_quantized + packed


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed JSON says about memory; buckets and limits are counted in elements."""

    stage: int
    secondary_ranks: int  # hpZ: ranks that hold a second copy of the parameters between them
    offload_optimizer: bool
    reduce_bucket: int
    num_buckets: int
    prefetch_bucket: int
    max_live: int
    sub_group: int
    sum_bytes: int = 4  # of an element of the gradients that ZeRO-2 and 3 add up from bfloat16
    reduce_bytes: int = 4  # the same of a bucket on its way through the ranks
    overlaps: bool = False  # collectives and computing


@dataclass(frozen=True)
class Setup:
    """Everything that the memory of a rank depends on."""

    shape: ModelShape
    sharding: Sharding
    world_size: int
    dtype_bytes: int
    micro_batch_tokens: int
    scoring_tokens: int  # of a forward without gradients, as evaluation has; 0 for none
    logits_per_chunk: int
    checkpointing: bool
    dropout: bool = False  # of an adapter's input
    padded: bool = False
    optimizer: str = "adamw"
    copies_checkpoints: bool = False  # which are written behind, from host memory
    mlp_tile: int = 0  # tokens of a tile of a dense MLP; 0: it takes a row at once
    offload_activations: bool = False  # the inputs of recomputed layers, to host memory
    ranks_per_row: int = 1  # train.sequence_parallel

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the gradient that lies in memory between two micro-batches."""
        wide = self.sharding.stage >= 2
        return max(self.dtype_bytes, self.sharding.sum_bytes) if wide else self.dtype_bytes

    @property
    def tiled(self) -> bool:
        """Whether there is a dense MLP that runs in tiles."""
        return self.mlp_tile > 0 and self.shape.num_mlp > 0

    def tokens_in_layers(self, tokens: int) -> int:
        """Tokens that pass the layers: padded pairs have their prompt twice, and padding."""
        return 2 * tokens if self.padded else tokens

    def tokens_of_rank(self, tokens: int) -> int:
        """Of them, those that one rank computes; padded, ranks share a pair's two sequences."""
        in_layers = self.tokens_in_layers(tokens)
        return -(-in_layers // (min(2, self.ranks_per_row) if self.padded else self.ranks_per_row))

    @property
    def shape_of_slice(self) -> ModelShape:
        """The model as a slice of a row meets it: where the ranks outnumber key-value heads, or
        cannot share them evenly, these are repeated."""
        heads = self.shape.num_key_value_heads
        repeats = 1 if self.padded or not heads else math.lcm(self.ranks_per_row, heads) // heads
        return replace(self.shape, key_value_width=repeats * self.shape.key_value_width)

    def exchanged_bytes(self, tokens: float, forwards: int = 1) -> float:
        """What a rank sends to those that share its rows, in a forward and backward over `tokens`.

        Queries, keys and values go one way and what attention makes of them the other; their
        gradients once more, and recomputed layers too. `forwards` counts those without recomputing.
        """
        if self.padded:
            return 0.0
        return tokens / self.ranks_per_row * self.exchanged_each * (self.passes + forwards - 1)

    @property
    def exchanged_each(self) -> float:
        """The same of a token and a pass, over all layers; a rank keeps its own part."""
        shape, others = self.shape_of_slice, self.ranks_per_row - 1
        width = 2 * (shape.query_width + shape.key_value_width)
        return shape.num_layers * self.dtype_bytes * width * others / self.ranks_per_row

    @property
    def passes(self) -> int:
        """Forward, backward, and the forward that is recomputed."""
        return 2 + self.checkpointing

    def shards(self, *, from_stage: int) -> int:
        """The ranks that share what ZeRO shards from `from_stage` on; 1 below that stage."""
        return self.world_size if self.sharding.stage >= from_stage else 1


@dataclass(frozen=True)
class PairCounts:
    """The prepared pairs in numbers. A pair's tokens are prompt + chosen + rejected."""

    num_pairs: int
    num_held_out: int
    num_steps: int
    mean_tokens: float  # of a training pair
    longest_tokens: int
    reference_tokens: int  # of all pairs, held-out ones included; what they share once
    micro_batches: tuple[int, ...]  # of a rank, in each of the first steps
    computed: Mapping[str, float]  # by data.order: share of a step's tokens that is not shared


def sharding_of(ds_config: dict[str, Any]) -> Sharding:
    """Reads a DeepSpeed config; keys that it leaves out have DeepSpeed's defaults."""
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    overlapping = zero.get("overlap_comm", False)
    return Sharding(
        stage=stage,
        secondary_ranks=zero.get("zero_hpz_partition_size", 1) if stage == 3 else 1,
        offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)) if stage else 0,
        # ZeRO-1 and 2 fill one bucket while the other is reduced
        num_buckets=2 if stage in (1, 2) and overlapping else 1,
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        sum_bytes=2 if "16" in ds_config.get("data_types", {}).get("grad_accum_dtype", "") else 4,
        reduce_bytes=2 if "16" in ds_config.get("communication_data_type", "") else 4,
        overlaps=overlapping,
    )
