"""Memory and work of a training run as plain arithmetic: no torch, no files, no machine.

1. `state_lines`: what DeepSpeed holds from the first step to the last.
2. `micro_batch_lines`, `update_lines` and `scoring_lines`: what a backward, an optimizer update or
   a forward without gradients adds to it.
3. `host_lines`: what an offloaded optimizer holds in host memory instead.
4. `estimate` adds them up. Beside it: the reference pass, disk and FLOPs.

Every amount is a `Line` that carries its own arithmetic. A test compares the lines
with what DeepSpeed and autograd really hold; docs/planning.md says what they leave out.

d bytes of an element of `dtype`, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
RESERVE_BYTES = 2 * GIB  # assumed: CUDA context, NCCL's buffers, fragmentation of the allocator
NF4_BLOCK, NF4_SCALES_A_BLOCK = 64, 256  # weights of a scale, scales of a scale of scales
STATE_BYTES = {  # of an optimizer, of a trained parameter
    "adamw": 8.0,
    "adamw_8bit": 2 + 2 * 4 / 256,  # a float32 scale of 256 values, for both moments
    "paged_adamw": 8.0,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "muon": 4.0,  # a momentum; one moment more of what it leaves to AdamW
}
GPUS_PER_NODE = 8  # assumed where nothing says otherwise


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
    num_quantized: int = 0  # of num_parameters, those that are held in NF4
    largest_quantized: int = 0  # of one layer
    num_factors: int = 0  # rows and columns of the trained matrices, which Adafactor keeps
    num_without_muon: int = 0  # of num_trained, what Muon leaves to AdamW


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed JSON says about memory; sizes are counted in elements."""

    stage: int
    secondary_ranks: int  # hpZ: ranks that hold a second copy of the parameters between them
    offload_optimizer: bool
    reduce_bucket: int
    num_buckets: int
    prefetch_bucket: int
    max_live: int
    sub_group: int


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


@dataclass(frozen=True)
class Line:
    """An amount with its arithmetic."""

    name: str
    num_bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, and of one host where the optimizer is offloaded."""

    states: tuple[Line, ...]
    micro_batch: tuple[Line, ...]
    update: tuple[Line, ...]
    scoring: tuple[Line, ...]
    host: tuple[Line, ...]

    @property
    def peak_bytes(self) -> int:
        """The states, and the largest of what a micro-batch, an update or scoring adds."""
        return total(self.states) + max(map(total, (self.micro_batch, self.update, self.scoring)))


def total(lines: Sequence[Line]) -> int:
    """Bytes of all lines."""
    return sum(line.num_bytes for line in lines)


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
    )


def estimate(setup: Setup) -> Memory:
    """Memory of one GPU of a training run, and of one host with an offloaded optimizer."""
    return Memory(
        states=tuple(state_lines(setup)),
        micro_batch=tuple(micro_batch_lines(setup)),
        update=tuple(update_lines(setup)),
        scoring=tuple(scoring_lines(setup)) if setup.scoring_tokens else (),
        host=tuple(host_lines(setup)),
    )


def state_lines(setup: Setup) -> Iterator[Line]:
    """Parameters, gradients, optimizer and buckets: there from the first step to the last."""
    shape, sharding, d = setup.shape, setup.sharding, setup.dtype_bytes
    yield from parameter_lines(setup)
    if sharding.secondary_ranks > 1:
        ranks = min(sharding.secondary_ranks, setup.world_size)
        held = _held_parameters(shape, d)
        yield _share("second_parameters", d, held, "", ranks, "ranks of a node")
    if not sharding.offload_optimizer:
        yield _share("gradients", d, shape.num_trained, "trained ", _ranks(setup, from_stage=2))
        yield from _optimizer_lines(setup)
    if sharding.stage:
        count = sharding.num_buckets
        yield Line(
            "reduce_buckets",
            count * d * sharding.reduce_bucket,
            f"{count} x {d} bytes x {_count(sharding.reduce_bucket)} elements",
        )


def parameter_lines(setup: Setup) -> Iterator[Line]:
    """The parameters: in dtype, or in NF4 with the scales of their blocks.

    Two weights lie in a byte; the scale of a block is a byte too, and those have float32 scales of
    their own. ZeRO-3 shards the weights and not the scales.
    """
    shape, d = setup.shape, setup.dtype_bytes
    packed, ranks = shape.num_quantized, _ranks(setup, from_stage=3)
    kind = "unquantized " if packed else ""
    yield _share("parameters", d, shape.num_parameters - packed, kind, ranks)
    if packed:
        yield _share("nf4_parameters", 0.5, packed, "quantized ", ranks)
        scale = f"1/{NF4_BLOCK} + 4/{NF4_BLOCK * NF4_SCALES_A_BLOCK}"
        num_bytes = packed * (1 + 4 / NF4_SCALES_A_BLOCK) / NF4_BLOCK
        text = f"({scale}) bytes x {_count(packed)} quantized parameters, on every rank"
        yield Line("nf4_scales", round(num_bytes), text)


def _optimizer_lines(setup: Setup) -> Iterator[Line]:
    """The optimizer's state, with the float32 copy of the parameters that DeepSpeed keeps.

    It keeps one beside float32 parameters too, unless it does not shard at all.
    """
    shape, stage, trained = setup.shape, setup.sharding.stage, setup.shape.num_trained
    copy = 0 if stage == 0 and setup.dtype_bytes == 4 else 4
    if setup.optimizer == "adafactor":
        text = f"4 bytes x {_count(shape.num_factors)} rows and columns of trained matrices"
        yield Line("optimizer", 4 * shape.num_factors, text)
        return
    each, ranks = STATE_BYTES[setup.optimizer] + copy, _ranks(setup, from_stage=1)
    yield _share("optimizer", each, trained, "trained ", ranks)
    if setup.optimizer == "muon" and shape.num_without_muon:
        kind = "embedding, head and vector "
        yield _share("second_moment", 4, shape.num_without_muon, kind, ranks)


def host_lines(setup: Setup) -> Iterator[Line]:
    """An offloaded optimizer's float32 copy, moments and gradient, and one more gradient in dtype.

    Of one node: all its ranks hold their share there.
    """
    if setup.sharding.offload_optimizer:
        ranks = min(setup.world_size, GPUS_PER_NODE)
        each, trained = 16 + setup.dtype_bytes, setup.shape.num_trained
        yield Line(
            "optimizer",
            ranks * each * trained // setup.world_size,
            f"{ranks} ranks of a node x {each} bytes x {_count(trained)} trained parameters"
            f" / {setup.world_size} ranks",
        )


def micro_batch_lines(setup: Setup) -> Iterator[Line]:
    """What is added between the start of a forward and the end of its backward."""
    yield _activations(setup)
    yield from _gathered(setup)
    shape, d = setup.shape, setup.dtype_bytes
    chunk = _head_chunk(setup, setup.micro_batch_tokens)
    if shape.head_trained:
        head = shape.vocab_size * shape.hidden_size
        text = f"{chunk.arithmetic} + {d} bytes x {_count(head)} of the head's gradient"
        chunk = Line("head", chunk.num_bytes + d * head, text)
    yield chunk


def scoring_lines(setup: Setup) -> Iterator[Line]:
    """What a forward without gradients adds: the widest place of one layer, and the head."""
    tokens, padded = _through_layers(setup, setup.scoring_tokens)
    each = forward_bytes(setup.shape, setup.dtype_bytes)
    yield Line("activations", tokens * each, f"{tokens:,} tokens{padded} x {each:,} bytes")
    yield from _gathered(setup)
    yield _head_chunk(setup, setup.scoring_tokens)


def update_lines(setup: Setup) -> Iterator[Line]:
    """What an optimizer update adds: the gradient flattened, then as float32."""
    trained, sharding, d = setup.shape.num_trained, setup.sharding, setup.dtype_bytes
    if sharding.offload_optimizer:
        return
    if sharding.stage == 0:
        yield Line("update", 4 * trained, f"4 bytes x {_count(trained)} trained parameters at once")
        return
    own = -(-trained // setup.world_size)
    at_once = min(own, sharding.sub_group) if sharding.stage == 3 else own
    each = 4 if d == 4 else 4 + d
    yield Line(
        "update", each * at_once, f"{each} bytes x {_count(at_once)} of a rank's share at once"
    )


def flops_per_token(shape: ModelShape, checkpointing: bool) -> tuple[int, int]:
    """Matrix products of one token (forward, training step), without attention scores.

    Two a matrix element forward; as many again for the gradient of the activations, for the
    gradient of each trained element, and for a forward made again. See docs/planning.md.
    """
    forward = 2 * shape.num_active
    trained = 2 * min(shape.num_trained, shape.num_active)
    return forward, forward * (3 if checkpointing else 2) + trained


def reference_lines(setup: Setup, sharding: Sharding) -> tuple[Line, ...]:
    """Memory of a rank in the reference pass: the parameters and a forward without gradients."""
    scoring = replace(setup, sharding=sharding)
    return *parameter_lines(scoring), *scoring_lines(scoring)


def checkpoint_line(setup: Setup, num_kept: int) -> Line:
    """Checkpoints on disk while one more than `num_kept` is being written.

    Of a trained parameter the optimizer's state and the float32 copy, below ZeRO-3 also the
    parameter as it is trained; of a frozen one nothing.
    """
    d, sharding, trained = setup.dtype_bytes, setup.sharding, setup.shape.num_trained
    has_copy = sharding.stage == 3 or (sharding.stage == 0 and d == 4)
    each = STATE_BYTES.get(setup.optimizer, 0) + (4 if has_copy else 4 + d)
    return Line(
        "checkpoints",
        round((num_kept + 1) * each * trained),
        f"{num_kept + 1} x {each:g} bytes x {_count(trained)} trained parameters",
    )


def export_lines(shape: ModelShape, d: int, adapter: bool, merge: bool) -> Iterator[Line]:
    """The exported adapter and the whole model, in elements of d bytes."""
    base = shape.num_parameters - (shape.num_trained if adapter else 0)
    if adapter:
        yield _share("export_adapter", d, shape.num_trained, "trained ", 1)
    if merge or not adapter:
        yield _share("export_model", d, base, "", 1)


def layer_bytes(shape: ModelShape, d: int, dropout: bool = False) -> int:
    """Bytes that autograd keeps of one token in one layer.

    A norm keeps its input in float32 and its normalized value; the attention q, k and v (with
    every prompt at most twice) and its output twice; a gated MLP gate, activation, up and product;
    linear layers their inputs, where nothing has them yet. Experts keep their gathered input and
    their output. An adapter keeps what lies between its two matrices and, with dropout, its own
    input and a mask.
    """
    norms = shape.norms_per_layer * (4 + d) * shape.hidden_size
    inputs = d * 2 * shape.hidden_size
    attention = d * (3 * shape.query_width + 4 * shape.key_value_width)
    mlp = d * (4 if shape.mlp_matrices == 3 else 2) * shape.mlp_width
    experts = d * 2 * shape.experts_per_token * shape.hidden_size
    adapter = d * shape.adapter_ranks + (d + 1) * dropout * shape.adapter_inputs
    return norms + inputs + attention + mlp + experts + adapter


def forward_bytes(shape: ModelShape, d: int) -> int:
    """Bytes of one token at the widest place of a layer when nothing is kept for a backward.

    Residual, layer input and norm, beside the inner parts of the MLP or of the attention.
    """
    mlp = shape.mlp_matrices * shape.mlp_width + 2 * shape.experts_per_token * shape.hidden_size
    attention = 3 * shape.query_width + 4 * shape.key_value_width
    return d * (3 * shape.hidden_size + max(mlp, attention))


def _activations(setup: Setup) -> Line:
    """Layer inputs and one layer again with gradient checkpointing, all layers without."""
    shape, d = setup.shape, setup.dtype_bytes
    tokens, padded = _through_layers(setup, setup.micro_batch_tokens)
    layer = layer_bytes(shape, d, setup.dropout)
    kept = d * shape.hidden_size if setup.checkpointing else layer
    # The backward of an MLP holds the gradients of gate and up and of the layer's input and output
    flowing = d * 2 * (shape.mlp_width + shape.hidden_size)
    last = (4 + 4 * d) * shape.hidden_size  # the last norm, and completion positions of its output
    again = layer if setup.checkpointing else 0
    each = shape.num_layers * kept + again + flowing + last
    parts = [f"{shape.num_layers} layers x {kept:,}"]
    if setup.checkpointing:
        parts.append(f"{layer:,} of a layer made again")
    parts += [f"{flowing:,} of gradients", f"{last:,} behind the last layer"]
    return Line(
        "activations",
        tokens * each,
        f"{tokens:,} tokens{padded} x ({' + '.join(parts)}) bytes",
    )


def _gathered(setup: Setup) -> Iterator[Line]:
    """Whole parameters that ZeRO-3 holds for a while; a lone rank has them anyway.

    DeepSpeed fetches the module it runs beyond max_live, and copies what it fetched ahead.
    """
    shape, sharding, d = setup.shape, setup.sharding, setup.dtype_bytes
    if shape.num_quantized:
        largest = shape.largest_quantized
        text = f"{d} bytes x {_count(largest)} of the largest quantized layer"
        yield Line("unpacked_layer", d * largest, text)
    if sharding.stage == 3 and setup.world_size > 1:
        head, held = shape.vocab_size * shape.hidden_size, _held_parameters(shape, d)
        module = max(head, (held - head) // shape.num_layers)
        live = min(held, sharding.max_live + module)
        fetched = min(held, sharding.prefetch_bucket)
        yield Line(
            "gathered_parameters",
            d * (live + fetched),
            f"{d} bytes x ({_count(live)} live + {_count(fetched)} on their way)",
        )


def _head_chunk(setup: Setup, tokens: int) -> Line:
    d = setup.dtype_bytes
    logits = min(setup.logits_per_chunk, tokens * setup.shape.vocab_size)
    each = 4 if d == 4 else 4 + d  # float32, and a copy in dtype for the matrix product
    return Line("head", each * logits, f"{each} bytes x {_count(logits)} logits of a chunk")


def _through_layers(setup: Setup, tokens: int) -> tuple[int, str]:
    """Tokens that go through the layers; padded pairs have their prompt twice, and padding."""
    return (2 * tokens, " (padded)") if setup.padded else (tokens, "")


def _ranks(setup: Setup, from_stage: int) -> int:
    return setup.world_size if setup.sharding.stage >= from_stage else 1


def _held_parameters(shape: ModelShape, d: int) -> int:
    """Elements of dtype in memory: those in NF4 are packed into fewer."""
    return shape.num_parameters - shape.num_quantized + shape.num_quantized // (2 * d)


def _share(name: str, each: float, count: int, kind: str, ranks: int, of: str = "ranks") -> Line:
    text = f"{each:g} bytes x {_count(count)} {kind}parameters"
    return Line(name, int(each * count) // ranks, text if ranks == 1 else f"{text} / {ranks} {of}")


def _count(number: int) -> str:
    """12,345 or 678.9 M or 8.03 B."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number:,}"
    return f"{number:,}"
