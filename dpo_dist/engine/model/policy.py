"""The policy in training: base model, adapter, gradient checkpointing, DeepSpeed engine."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.backend_choice import choose_backend
from dpo_dist.engine.forward.layout_choice import choose_layout
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.load import load_model, num_parameters, partitioned_loading
from dpo_dist.engine.model.quantized import refuse_trained_quantized
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.engine.weights.adapter_file import fill_adapter
from dpo_dist.errors import ConfigError

_logger = logging.getLogger(__name__)


def build_policy(
    model_dir: Path,
    model: ModelSection,
    adapter: AdapterSection | None,
    train: TrainSection,
    *,
    sharding: dict[str, Any],
    num_steps: int,
    device: torch.device,
    seed: int,
    start: Path | None = None,
) -> tuple[Any, PairScorer]:
    """(DeepSpeed engine, the scorer inside it), in training mode, from the DeepSpeed config.

    `start` is the folder of an adapter to train on; without it the adapter is a fresh one.
    """
    set_seed(seed)
    zero3 = sharding if ds_config.zero_stage(sharding) == 3 else None
    policy: Any = load_policy(model_dir, model, adapter, device=device, zero3=zero3, start=start)
    if adapter is not None:
        refuse_trained_quantized(policy)
    if train.gradient_checkpointing:
        # ZeRO-3 with adapters gathers a recomputed layer only under the reentrant kind, which
        # in turn needs an input with a gradient when the embeddings are frozen.
        policy.activation_checkpointing_enable({"use_reentrant": True})
        policy.enable_input_require_grads()
    trainable, total = num_parameters(policy)
    _logger.info(
        "policy: %s of %s parameters train (%.2f %%)", f"{trainable:,}", f"{total:,}",
        100 * trainable / total,
    )  # fmt: skip
    scorer = PairScorer(policy)
    engine = zero.start_training(scorer, sharding, train, num_steps)
    engine.train()
    return engine, scorer


def load_policy(
    model_dir: Path,
    model: ModelSection,
    adapter: AdapterSection | None,
    *,
    device: torch.device,
    zero3: dict[str, Any] | None = None,
    start: Path | None = None,
) -> nn.Module:
    """The policy before its first step: the base model and the run's adapter on it, if any.

    `start` is the folder of an adapter that it continues; without it the adapter is a fresh one,
    which changes nothing yet. `zero3` as for `load_model`.
    """
    policy = load_model(model_dir, model, device=device, zero3=zero3)
    if adapter is None:
        return policy
    with partitioned_loading(None if model.quantization else zero3):
        policy = add_adapter(policy, adapter, str(model_dir), start)
        if start is not None:
            fill_adapter(policy, start)
    return policy


def set_seed(seed: int) -> None:
    """Seeds every generator alike on all ranks: adapters must start equal everywhere."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def settle_layout(
    model: nn.Module, scorer: PairScorer, section: ModelSection, device: torch.device
) -> Layout:
    """Sets the scorer's attention backend and layout, says why, and returns the layout.

    `model` is the scorer or the DeepSpeed engine around it; all ranks call together. Raises
    ConfigError when `section` asks for what the model cannot do, and DPODistError when the model
    scores wrong in every layout.
    """
    dtype = getattr(torch, section.dtype)
    scorer.backend, backend_reason = choose_backend(scorer.policy, section.attention, device, dtype)
    if section.layout == "padded":
        layout, reason = "padded", "model.layout"
    else:
        layout, reason = choose_layout(model, device)
    if section.layout not in ("auto", layout):
        raise ConfigError(
            f"model.layout is {section.layout}, but {reason}",
            "a layout in which the model scores right",
            "Set model.layout to auto.",
        )
    scorer.layout = layout
    if collectives.is_first():
        _logger.info(
            "layout: %s (%s); attention: %s (%s)", layout, reason, scorer.backend, backend_reason
        )
    return layout
