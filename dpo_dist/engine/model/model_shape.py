"""What memory and work depend on in a model and its adapter, counted without weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.forward.model_parts import EXPERT_COUNTS, base_of, output_module, train_text
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.quantized import count_quantized
from dpo_dist.engine.sharding.optimizers import split_for_muon
from dpo_dist.engine.weights.base_weights import build_skeleton
from dpo_dist.planning.setup import ModelShape


def count_model(
    model_dir: Path,
    adapter: AdapterSection | None,
    trust_remote_code: bool = False,
    *,
    start: Path | None = None,
    vocab_size: int | None = None,
    quantized: bool = False,
) -> ModelShape:
    """Builds the model on torch's meta device, where tensors have no memory, and counts it.

    The folder may hold config.json alone. `start` is the adapter that training continues, if any;
    `vocab_size` the tokens of lengthened embeddings. Raises ModelFilesError when transformers
    cannot build a causal LM from it, and ConfigError when the adapter does not suit the model.
    """
    policy: Any = build_skeleton(model_dir, trust_remote_code, vocab_size)
    packed = count_quantized(policy) if quantized else (0, 0)
    if adapter is not None:
        with torch.device("meta"):
            policy = add_adapter(policy, adapter, str(model_dir), start)
    else:
        train_text(policy)
    shape = shape_of(policy)
    return replace(shape, num_quantized=packed[0], largest_quantized=packed[1])


def shape_of(policy: nn.Module) -> ModelShape:
    """The numbers of a causal LM, with or without an adapter, on any device."""
    text = base_of(policy).config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    named_heads = getattr(text, "num_attention_heads", None) or 0
    heads = named_heads or 1
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", None) or 0
    width_of_expert = getattr(text, "moe_intermediate_size", None) if experts else None
    width = width_of_expert or getattr(text, "intermediate_size", None) or 4 * hidden
    named = dict(policy.named_parameters())
    inputs = [matrix.shape for name, matrix in named.items() if ".lora_A." in name]
    head = output_module(policy).weight
    available = next(filter(None, (getattr(text, name, None) for name in EXPERT_COUNTS)), 0)
    num_active, num_in_experts = _count_active(policy, experts / (available or 1))
    return ModelShape(
        num_parameters=sum(p.numel() for p in named.values()),
        num_trained=sum(p.numel() for p in named.values() if p.requires_grad),
        num_active=num_active,
        num_layers=layers,
        hidden_size=hidden,
        query_width=heads * head_size,
        key_value_width=key_value_heads * head_size,
        mlp_width=width * max(experts, 1),
        mlp_matrices=3 if any("gate_" in name for name in named) else 2,
        experts_per_token=experts,
        norms_per_layer=_count_norms(policy, hidden) // layers,
        vocab_size=head.shape[0],
        head_trained=head.requires_grad,
        adapter_ranks=sum(shape[0] for shape in inputs) // layers,
        adapter_inputs=sum(shape[1] for shape in inputs) // layers,
        num_factors=_count_factors(policy),
        num_heads=named_heads,
        num_key_value_heads=key_value_heads if named_heads else 0,
        num_without_muon=sum(p.numel() for p in split_for_muon(policy)[False]),
        num_experts=available if experts else 0,
        num_in_experts=num_in_experts,
    )


def _count_factors(policy: nn.Module) -> int:
    """Elements of a second moment kept as rows and columns; of a vector, all."""
    shapes = [p.shape for p in policy.parameters() if p.requires_grad]
    return sum(
        math.prod(s[:-1]) + math.prod(s[:-2]) * s[-1] if len(s) > 1 else s.numel() for s in shapes
    )


def _count_norms(policy: nn.Module, hidden_size: int) -> int:
    """Norms over the hidden size; those over a head are small beside them."""
    weights = [
        getattr(module, "weight", None)
        for module in policy.modules()
        if "Norm" in type(module).__name__
    ]
    return sum(weight is not None and weight.shape == (hidden_size,) for weight in weights)


def _count_active(policy: nn.Module, share: float) -> tuple[int, int]:
    """Elements of the matrices that a token is multiplied with, and of those of all experts.

    An embedding is looked up, not multiplied, unless it is the head too; of the experts only the
    token's `share`.
    """
    embedding, head = base_of(policy).get_input_embeddings().weight, output_module(policy).weight
    elsewhere = in_experts = 0
    for name, parameter in policy.named_parameters():
        if ".experts." in name and parameter.ndim > 1:
            in_experts += parameter.numel()
        elif parameter.ndim > 1 and (parameter is not embedding or embedding is head):
            elsewhere += parameter.numel()
    return elsewhere + round(share * in_experts), in_experts
