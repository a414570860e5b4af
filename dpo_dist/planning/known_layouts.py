"""The shape of a model whose family is laid out as Llama is: arithmetic on config.json alone.

Building the model to count it takes seconds of imports. What is not plain here (another family, a
key that is missing or odd, an adapter of single layers) is left to `engine/model/model_shape.py`,
which builds it; where both count, they agree.
"""

from typing import Any

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.planning.setup import ModelShape

# model_type -> size of a head where config.json does not say; None: hidden_size / heads
FAMILIES = {"llama": None, "mistral": None, "qwen2": None, "qwen3": 128}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# of a larger model, of code beside it, of experts, of packed weights
NOT_PLAIN = ("text_config", "auto_map", "num_experts_per_tok", "quantization_config")


def known_shape(
    config: dict[str, Any],
    adapter: AdapterSection | None,
    *,
    vocab_size: int | None = None,
    quantized: bool = False,
) -> ModelShape | None:
    """The shape of the model of a config.json; None where it takes the model itself to know.

    `vocab_size` is that of lengthened embeddings; an adapter starts anew.
    """
    sizes = _sizes(config)
    if sizes is None:
        return None
    vocab, hidden, width, layers, query, key_value, head_size = sizes
    vocab = vocab_size or vocab
    shapes = {
        "q_proj": (query, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden),
        "o_proj": (hidden, query), "gate_proj": (width, hidden), "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }  # fmt: skip
    targets = _targets(adapter)
    if targets is None:
        return None
    tables = 1 if config.get("tie_word_embeddings") else 2
    norms = [hidden, hidden] + [head_size, head_size] * (config["model_type"] == "qwen3")
    vectors = sum(norms) + sum(shapes[name][0] for name in _biased(config))
    matrices = sum(rows * columns for rows, columns in shapes.values())
    all_vectors = layers * vectors + hidden
    num_base = layers * matrices + tables * vocab * hidden + all_vectors
    edges = layers * sum(map(sum, shapes.values())) + tables * (vocab + hidden) + all_vectors
    rank = 0 if adapter is None else adapter.rank
    # a matrix of (rows, columns) gets factors of (rows, rank) and (rank, columns)
    num_added = layers * rank * sum(sum(shapes[name]) for name in targets)
    added_edges = layers * sum(sum(shapes[name]) + 2 * rank for name in targets)
    num_norms = layers * norms.count(hidden) + 1
    return ModelShape(
        num_parameters=num_base + num_added,
        num_trained=num_base if adapter is None else num_added,
        num_active=layers * matrices + vocab * hidden + num_added,
        num_layers=layers,
        hidden_size=hidden,
        query_width=query,
        key_value_width=key_value,
        mlp_width=width,
        mlp_matrices=len(MLP),
        experts_per_token=0,
        norms_per_layer=num_norms // layers,
        vocab_size=vocab,
        head_trained=adapter is None,
        adapter_ranks=rank * len(targets),
        adapter_inputs=sum(shapes[name][1] for name in targets),
        num_quantized=layers * matrices if quantized else 0,
        largest_quantized=max(r * c for r, c in shapes.values()) if quantized else 0,
        num_factors=edges if adapter is None else added_edges,
        num_without_muon=tables * vocab * hidden + all_vectors if adapter is None else 0,
        num_heads=query // head_size,
        num_key_value_heads=key_value // head_size,
    )


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int, int, int, int] | None:
    """(vocabulary, hidden, MLP, layers, queries, keys, one head), None unless all are plain."""
    family, found = config.get("model_type"), [config.get(name) for name in SIZES]
    if family not in FAMILIES or any(name in config for name in NOT_PLAIN):
        return None
    if any(type(size) is not int or size < 1 for size in found):
        return None
    vocab, hidden, width, layers, heads, key_value_heads = (int(size or 0) for size in found)
    if hidden % heads or heads % key_value_heads:
        return None
    head_size = config.get("head_dim") or FAMILIES[family] or hidden // heads
    if type(head_size) is not int or head_size < 1:
        return None
    return vocab, hidden, width, layers, heads * head_size, key_value_heads * head_size, head_size


def _targets(adapter: AdapterSection | None) -> tuple[str, ...] | None:
    """The linear layers of every layer that get an adapter, None unless it is all of a name."""
    if adapter is None:
        return ()
    special = (
        adapter.use_dora, adapter.modules_to_save, adapter.exclude_modules,
        adapter.target_parameters, adapter.rank_pattern, adapter.alpha_pattern,
    )  # fmt: skip
    named = adapter.target_modules
    names = {*ATTENTION, *MLP} if named == "all-linear" else {*named}
    if any(special) or (isinstance(named, str) and named != "all-linear"):
        return None
    return tuple(sorted(names)) if names and names <= {*ATTENTION, *MLP} else None


def _biased(config: dict[str, Any]) -> tuple[str, ...]:
    """The linear layers of a layer that have a bias."""
    family = config["model_type"]
    if family == "qwen2":
        return ATTENTION[:3]
    attention = family in ("llama", "qwen3") and config.get("attention_bias")
    mlp = family == "llama" and config.get("mlp_bias")
    return (ATTENTION if attention else ()) + (MLP if mlp else ())
