"""Transient memory: what a micro-batch, an optimizer update or a scoring forward adds for a while.

The three never overlap, so the peak has the largest of them on top of what is resident.

d bytes of an element of `dtype`.
"""

from collections.abc import Iterator

from dpo_dist.planning.setup import ModelShape, Setup
from dpo_dist.planning.sizes import Size, shortened


def micro_batch_sizes(setup: Setup) -> Iterator[Size]:
    """What is added between the start of a forward and the end of its backward."""
    yield _training_activations(setup)
    yield from _tile_gradients(setup)
    yield from _gathered_parameters(setup)
    shape, d = setup.shape, setup.dtype_bytes
    if d == 2 and setup.sharding.stage < 2:
        text = f"4 bytes x {shortened(shape.num_trained)} trained parameters, over micro-batches"
        yield Size("gradient_sums", 4 * shape.num_trained, text)
    logits = _logits(setup, setup.micro_batch_tokens)
    if shape.head_trained:
        each = d if d == 4 else 4 + d  # the sum over chunks, and a chunk's own
        gradient = f"{each} bytes x {shortened(shape.num_head)} elements of the head's gradient"
        logits = Size(
            logits.name,
            logits.num_bytes + each * shape.num_head,
            f"{logits.arithmetic} + {gradient}",
        )
    yield logits


def scoring_sizes(setup: Setup) -> Iterator[Size]:
    """What a forward without gradients adds: the widest place of one layer, and the head."""
    yield _scoring_activations(setup)
    yield from _gathered_parameters(setup)
    yield _logits(setup, setup.scoring_tokens)


def update_sizes(setup: Setup) -> Iterator[Size]:
    """What an optimizer update adds: the gradient flattened, then as float32.

    The float32 sums of ZeRO-2 are flat already, but for those that Muon orthogonalizes.
    """
    trained, sharding, d = setup.shape.num_trained, setup.sharding, setup.dtype_bytes
    flat = sharding.stage == 2 and setup.gradient_bytes > d and setup.optimizer != "muon"
    if sharding.offload_optimizer or flat:
        return
    if sharding.stage == 0:
        text = f"4 bytes x {shortened(trained)} trained parameters at once"
        yield Size("update", 4 * trained, text)
        return
    share = -(-trained // setup.world_size)
    at_once = min(share, sharding.sub_group) if sharding.stage == 3 else share
    each = 4 if setup.gradient_bytes == 4 else 4 + d
    text = f"{each} bytes x {shortened(at_once)} parameters of a rank's share at once"
    yield Size("update", each * at_once, text)


def layer_bytes(shape: ModelShape, d: int, dropout: bool = False) -> int:
    """Bytes that autograd keeps per token and layer.

    A norm keeps its input in float32 and its normalized value; attention its q, k and v (with
    every prompt at most twice) and its output twice; a gated MLP its gate, activation, up and
    product; linear layers their inputs, where nothing has kept them yet. Experts keep their
    gathered input and their output. An adapter keeps what lies between its two matrices and, with
    dropout, its own input and a mask.
    """
    norms = shape.norms_per_layer * (4 + d) * shape.hidden_size
    inputs = d * 2 * shape.hidden_size
    attention = d * (3 * shape.query_width + 4 * shape.key_value_width)
    experts = d * 2 * shape.experts_per_token * shape.hidden_size
    adapter = d * shape.adapter_ranks + (d + 1) * dropout * shape.adapter_inputs
    return norms + inputs + attention + _mlp_bytes(shape, d) + experts + adapter


def _mlp_bytes(shape: ModelShape, d: int) -> int:
    """Of these, what lies between the matrices of the MLP."""
    return d * (4 if shape.mlp_matrices == 3 else 2) * shape.mlp_width


def _scoring_activations(setup: Setup) -> Size:
    """The widest place of a layer when nothing is kept for a backward.

    Residual, layer input and norm, beside the inner parts of the MLP or of the attention. An MLP in
    tiles has its output beside one tile.
    """
    shape, d = setup.shape_of_slice, setup.dtype_bytes
    tokens, padded = _tokens_in_layers(setup, setup.scoring_tokens)
    mlp = shape.mlp_matrices * shape.mlp_width + 2 * shape.experts_per_token * shape.hidden_size
    attention = 3 * shape.query_width + 4 * shape.key_value_width
    if setup.ranks_per_row > 1:  # what is sent beside what is received
        attention += 2 * shape.key_value_width
    tile = min(tokens, setup.mlp_tile) if setup.tiled else tokens
    each = d * (3 * shape.hidden_size + (0 if setup.tiled else max(mlp, attention)))
    arithmetic, num_bytes = f"{tokens:,} tokens{padded} x {each:,} bytes", tokens * each
    if setup.tiled:
        whole = max(attention, shape.hidden_size)
        if tokens * whole >= tile * mlp:
            each += d * whole
            arithmetic, num_bytes = f"{tokens:,} tokens{padded} x {each:,} bytes", tokens * each
        else:
            arithmetic += f" + {tile:,} tokens of a tile x {d * mlp:,} bytes"
            num_bytes += tile * d * mlp
    return Size("activations", num_bytes, arithmetic)


def _training_activations(setup: Setup) -> Size:
    """All layers; with gradient checkpointing their inputs and one layer recomputed.

    An MLP in tiles keeps its input, which is that of its matrices, and has the rest of one tile.
    """
    shape, d = setup.shape_of_slice, setup.dtype_bytes
    tokens, padded = _tokens_in_layers(setup, setup.micro_batch_tokens)
    layer = layer_bytes(shape, d, setup.dropout) - setup.tiled * _mlp_bytes(shape, d)
    kept = d * shape.hidden_size if setup.checkpointing else layer
    recomputed = layer if setup.checkpointing else 0
    # inputs that are offloaded: one is back for its layer, the next one is on its way
    layers = min(2, shape.num_layers) if setup.offload_activations else shape.num_layers
    # The backward of an MLP holds the gradients of gate and up and of the layer's input and output
    inner = d * 2 * shape.mlp_width
    gradients = d * 2 * shape.hidden_size + (0 if setup.tiled else inner)
    last = (4 + 4 * d) * shape.hidden_size  # the last norm, and completion positions of its output
    each = layers * kept + recomputed + gradients + last
    parts = [f"{layers} layers x {kept:,}"]
    if setup.checkpointing:
        parts.append(f"{recomputed:,} of a recomputed layer")
    parts += [f"{gradients:,} of gradients", f"{last:,} after the last layer"]
    arithmetic, num_bytes = (
        f"{tokens:,} tokens{padded} x ({' + '.join(parts)}) bytes",
        tokens * each,
    )
    if setup.tiled:
        tile, of_tile = min(tokens, setup.mlp_tile), _mlp_bytes(shape, d) + inner
        arithmetic += f" + {tile:,} tokens of a tile x {of_tile:,} bytes"
        num_bytes += tile * of_tile
    return Size("activations", num_bytes, arithmetic)


def _tile_gradients(setup: Setup) -> Iterator[Size]:
    """Of what trains in one MLP: the sum over tiles in float32, beside a tile's own gradients."""
    shape, each = setup.shape, 4 + setup.dtype_bytes
    if setup.tiled and setup.tokens_of_rank(setup.micro_batch_tokens) > setup.mlp_tile:
        count = min(shape.num_mlp, shape.num_trained // shape.num_layers)
        text = f"{each} bytes x {shortened(count)} trained parameters of an MLP"
        yield Size("tile_gradients", each * count, text)


def _gathered_parameters(setup: Setup) -> Iterator[Size]:
    """Whole parameters: an unpacked NF4 layer, and what ZeRO-3 gathers on two ranks or more.

    DeepSpeed fetches the module it runs beyond max_live, and copies what it prefetched.
    """
    shape, sharding, d = setup.shape, setup.sharding, setup.dtype_bytes
    if shape.num_quantized:
        largest = shape.largest_quantized
        text = f"{d} bytes x {shortened(largest)} parameters of the largest quantized layer"
        yield Size("unpacked_layer", d * largest, text)
    if sharding.stage == 3 and setup.world_size > 1:
        held = shape.num_held(d)
        module = max(shape.num_head, (held - shape.num_head) // shape.num_layers)
        live = min(held, sharding.max_live + module)
        prefetched = min(held, sharding.prefetch_bucket)
        text = f"{d} bytes x ({shortened(live)} live + {shortened(prefetched)} prefetched)"
        yield Size("gathered_parameters", d * (live + prefetched), text)


def _logits(setup: Setup, tokens: int) -> Size:
    """One chunk of logits in float32, with a copy in dtype for the matrix product."""
    d = setup.dtype_bytes
    of_rank = -(-tokens // setup.ranks_per_row)
    count = min(setup.logits_per_chunk, of_rank * setup.shape.vocab_size)
    each = 4 if d == 4 else 4 + d
    return Size("head", each * count, f"{each} bytes x {shortened(count)} logits of a chunk")


def _tokens_in_layers(setup: Setup, tokens: int) -> tuple[int, str]:
    note = " (padded)" if setup.padded else ""
    if setup.ranks_per_row > 1:
        note = f" of {setup.tokens_in_layers(tokens):,}{note}"
    return setup.tokens_of_rank(tokens), note
