"""Resident memory: what DeepSpeed holds from the first step of training to the last.

Parameters, gradients, optimizer states, communication buckets; with an offloaded optimizer also
what lies in host memory.
"""

from collections.abc import Iterator

from dpo_dist.planning.setup import Setup
from dpo_dist.planning.sizes import Size, shortened, size_of_parameters

GPUS_PER_NODE = 8  # assumed where nothing says otherwise
NF4_BLOCK, NF4_SCALES_PER_BLOCK = 64, 256  # weights of a scale, scales of a scale of scales
OPTIMIZER_BYTES = {  # of the optimizer's own state, per trained parameter
    "adamw": 8.0,
    "adamw_8bit": 2 + 2 * 4 / 256,  # a float32 scale of 256 values, for both moments
    "paged_adamw": 8.0,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "muon": 4.0,  # the momentum; what it leaves to AdamW has one moment more
}


def resident_sizes(setup: Setup) -> Iterator[Size]:
    """What a GPU holds all the time."""
    shape, sharding, d = setup.shape, setup.sharding, setup.dtype_bytes
    yield from parameter_sizes(setup)
    if sharding.secondary_ranks > 1:
        yield _second_parameters(setup)
    if not sharding.offload_optimizer:
        shards = setup.shards(from_stage=2)
        each = setup.gradient_bytes
        yield size_of_parameters("gradients", each, shape.num_trained, "trained", ranks=shards)
        yield from _optimizer_sizes(setup)
    if sharding.stage:
        count = sharding.num_buckets
        yield Size(
            "reduce_buckets",
            count * d * sharding.reduce_bucket,
            f"{count} x {d} bytes x {shortened(sharding.reduce_bucket)} elements",
        )
        if sharding.reduce_bytes > d:
            yield Size(
                "reduced_bucket",
                sharding.reduce_bytes * sharding.reduce_bucket,
                f"{sharding.reduce_bytes} bytes x {shortened(sharding.reduce_bucket)} elements, "
                "the copy that is added up over ranks",
            )


def parameter_sizes(setup: Setup) -> Iterator[Size]:
    """The parameters: in dtype, or in NF4 with the scales of their blocks.

    Two NF4 weights share a byte. The scale of a block is a byte too, and blocks of scales have
    float32 scales of their own. ZeRO-3 shards the weights and not the scales.
    """
    shape, d = setup.shape, setup.dtype_bytes
    quantized, shards = shape.num_quantized, setup.shards(from_stage=3)
    which = "unquantized" if quantized else ""
    plain = shape.num_parameters - quantized
    yield size_of_parameters("parameters", d, plain, which, ranks=shards)
    if quantized:
        yield size_of_parameters("nf4_parameters", 0.5, quantized, "quantized", ranks=shards)
        scale = f"1/{NF4_BLOCK} + 4/{NF4_BLOCK * NF4_SCALES_PER_BLOCK}"
        yield Size(
            "nf4_scales",
            round(quantized * (1 + 4 / NF4_SCALES_PER_BLOCK) / NF4_BLOCK),
            f"({scale}) bytes x {shortened(quantized)} quantized parameters, on every rank",
        )


def _second_parameters(setup: Setup) -> Size:
    """The copy that hpZ keeps within a node, so that gathers do not leave it."""
    d, ranks = setup.dtype_bytes, min(setup.sharding.secondary_ranks, setup.world_size)
    held = setup.shape.num_held(d)
    size = size_of_parameters("second_parameters", d, held, ranks=ranks)
    within = "" if ranks == 1 else " of a node"
    return Size(size.name, size.num_bytes, f"{size.arithmetic}{within}")


def _optimizer_sizes(setup: Setup) -> Iterator[Size]:
    """The optimizer's state, with the float32 copy of the parameters that DeepSpeed keeps.

    It keeps one beside float32 parameters too, unless it does not shard at all.
    """
    shape = setup.shape
    if setup.optimizer == "adafactor":
        text = f"4 bytes x {shortened(shape.num_factors)} rows and columns of trained matrices"
        yield Size("optimizer", 4 * shape.num_factors, text)
        return
    copy = 0 if setup.sharding.stage == 0 and setup.dtype_bytes == 4 else 4
    each, shards = OPTIMIZER_BYTES[setup.optimizer] + copy, setup.shards(from_stage=1)
    yield size_of_parameters("optimizer", each, shape.num_trained, "trained", ranks=shards)
    if setup.optimizer == "muon" and shape.num_without_muon:
        which = "embedding, head and vector"
        count = shape.num_without_muon
        yield size_of_parameters("second_moment", 4, count, which, ranks=shards)


def checkpoint_bytes_each(setup: Setup) -> float:
    """Bytes that a trained parameter takes in a checkpoint, all ranks together."""
    d, stage = setup.dtype_bytes, setup.sharding.stage
    copy_alone = stage == 3 or (stage == 0 and d == 4)
    return OPTIMIZER_BYTES.get(setup.optimizer, 0) + (4 if copy_alone else 4 + d)


def host_sizes(setup: Setup) -> Iterator[Size]:
    """What the host of a node holds, all ranks of the node together.

    For an offloaded optimizer the float32 copy, two moments and the gradient in float32, and once
    more the gradient's sum; for checkpoints that are written behind a copy of the node's shards.
    """
    ranks, trained = min(setup.world_size, GPUS_PER_NODE), setup.shape.num_trained
    of_node = f"{ranks} ranks of a node x "
    parameters = f" bytes x {shortened(trained)} trained parameters"
    if setup.sharding.offload_optimizer:
        each = 16 + setup.gradient_bytes
        yield Size(
            "optimizer",
            ranks * each * trained // setup.world_size,
            f"{of_node}{each}{parameters} / {setup.world_size} ranks",
        )
    if setup.copies_checkpoints:
        each = checkpoint_bytes_each(setup)
        if setup.sharding.stage == 3:
            num_bytes = int(ranks * each * trained) // setup.world_size
            why = f"{of_node}{each:g}{parameters} / {setup.world_size} ranks"
        else:  # rank 0 writes the weights, and without ZeRO all
            num_bytes, why = int(each * trained), f"{each:g}{parameters}, on rank 0's node"
        yield Size("checkpoint_copy", num_bytes, f"{why}, where memory has room")
    if setup.offload_activations:
        shape, each = setup.shape, setup.dtype_bytes * setup.shape.hidden_size
        tokens = setup.tokens_of_rank(setup.micro_batch_tokens)
        why = f"{of_node}{shape.num_layers} layers x {tokens:,} tokens x {each:,} bytes"
        yield Size("layer_inputs", ranks * shape.num_layers * tokens * each, why)
