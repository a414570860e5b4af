"""Tiny random Hugging Face models by family: real architectures, a few thousand parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW = 7  # tokens; shorter than every prompt the tests build, so that a sliding window bites

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_TWO_EXPERTS_OF_FOUR: dict[str, Any] = {"num_experts_per_tok": 2}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention"]
_DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}


def _longrope(num_frequencies: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * num_frequencies,
        "long_factor": [4.0] * num_frequencies,
    }


# What each family needs beside _COMMON: (model_type, extra config keys).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "smollm3": ("smollm3", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": _FULL_AND_SLIDING}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _FULL_AND_SLIDING,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _FULL_AND_SLIDING,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **_TWO_EXPERTS_OF_FOUR}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, **_TWO_EXPERTS_OF_FOUR},
    ),
    "qwen2_moe": (  # states its windows in the mask and nowhere else
        "qwen2_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _FULL_AND_SLIDING,
            **_TWO_EXPERTS_OF_FOUR,
        },
    ),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "phi": ("phi", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _FULL_AND_SLIDING,
            **_TWO_EXPERTS_OF_FOUR,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "no_rope_layers": [1, 0],
        },
    ),
    "stablelm": ("stablelm", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "mamba": ("mamba", {"state_size": 8}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "lru_width": 32,
            "head_dim": 8,
            "attention_window_size": WINDOW,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    # frequencies that depend on the length from 64 positions on
    "phi3_longrope": (
        "phi3",
        {"rope_parameters": _longrope(4), "original_max_position_embeddings": 64},
    ),
    "phimoe_longrope": (
        "phimoe",
        {
            "num_local_experts": 4,
            "rope_parameters": {**_longrope(4), "short_mscale": 1.1, "long_mscale": 1.3},
            **_TWO_EXPERTS_OF_FOUR,
        },
    ),
    "gemma3_longrope": (  # of one kind of its layers
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _FULL_AND_SLIDING,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": _longrope(4),
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama_dynamic": ("llama", _DYNAMIC),
    "stablelm_dynamic": ("stablelm", {"num_attention_heads": 2, **_DYNAMIC}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = 128
) -> PreTrainedModel:
    """Return a random two-layer causal LM of `family` (one of FAMILIES) in eval mode.

    Weights are drawn wide enough that tokens mix strongly, and biases and attention sinks are not
    zero, so that a wrong mask or a dropped term moves the log-probs far beyond rounding.
    """
    model_type, extra = _FAMILIES[family]
    settings = copy.deepcopy({**_COMMON, **extra})  # a config writes into its rope_parameters
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # decay of a state-space layer, of a form of its own
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
    return model.to(dtype).eval()
