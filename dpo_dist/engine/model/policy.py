"""The policy in training: base model, adapter, gradient checkpointing, DeepSpeed engine."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import join_team
from dpo_dist.engine.forward.layout_choice import settle
from dpo_dist.engine.forward.model_parts import train_text
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.dropout import check_no_dropout
from dpo_dist.engine.model.load import load_model, num_parameters, partitioned_loading
from dpo_dist.engine.model.quantized import refuse_trained_quantized
from dpo_dist.engine.model.recompute import recompute_layers
from dpo_dist.engine.model.self_check import check_key, read_check, write_check
from dpo_dist.engine.model.tiled_mlp import tile_mlps
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.engine.weights.adapter_file import fill_adapter
from dpo_dist.watch.heartbeat import during

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyParts:
    """What a policy is made of before its first step."""

    base: Path  # folder of the base model
    model: ModelSection
    adapter: AdapterSection | None = None
    start: Path | None = None  # folder of the adapter that it continues; None: a fresh one


def build_policy(
    parts: PolicyParts,
    train: TrainSection,
    sharding: dict[str, Any],
    *,
    num_steps: int,
    device: torch.device,
    seed: int,
) -> tuple[Any, PairScorer]:
    """(DeepSpeed engine, the scorer inside it), in training mode; `sharding` is its config."""
    set_seed(seed)
    zero3 = sharding if ds_config.zero_stage(sharding) == 3 else None
    policy: Any = load_policy(parts, device, zero3)
    if parts.adapter is not None:
        refuse_trained_quantized(policy)
    tile_mlps(policy, train.tiled_mlp, partitioned=zero3 is not None)
    if train.gradient_checkpointing:
        recompute_layers(policy, offload=train.offload_activations)
    trainable, total = num_parameters(policy)
    _logger.info(
        "policy: %s of %s parameters train (%.2f %%)",
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
    )
    scorer = PairScorer(policy, team=join_team(train.sequence_parallel))
    engine = zero.start_training(scorer, sharding, train, num_steps)
    engine.train()
    return engine, scorer


def load_policy(
    parts: PolicyParts, device: torch.device, zero3: dict[str, Any] | None = None
) -> nn.Module:
    """The base model with the adapter on it, if any; a fresh adapter changes nothing yet.

    `zero3` as for `load_model`.
    """
    policy = load_model(parts.base, parts.model, device=device, zero3=zero3)
    if parts.adapter is None:
        train_text(policy)
        return policy
    with partitioned_loading(None if parts.model.quantization else zero3):
        policy = add_adapter(policy, parts.adapter, str(parts.base), parts.start)
        if parts.start is not None:
            fill_adapter(policy, parts.start)
    return policy


def set_seed(seed: int) -> None:
    """Seeds every generator alike on all ranks: adapters must start equal everywhere."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def settle_layout(
    model: nn.Module, scorer: PairScorer, section: ModelSection, device: torch.device,
    record: Path | None = None,
) -> Layout:  # fmt: skip
    """Sets the scorer's attention backend and layout, says why, and returns the layout.

    `model` is the scorer or the DeepSpeed engine around it; all ranks call together. What an
    earlier stage found is taken from the file `record`, and what this one finds is added to it.
    Raises ConfigError when `section` asks for what the model cannot do or training would be random,
    and DPODistError when the model scores wrong in every layout.
    """
    key = check_key(scorer.policy, section, device, scorer.ranks_per_row)
    known = {} if record is None else read_check(record, key)
    with during("self_check"):
        settled = settle(
            scorer, layout=section.layout, attention=section.attention, engine=model,
            device=device, known=known,
        )  # fmt: skip
        found = settled.found
        if all(known.get(name) == found[name] for name in ("backend", "experts")):
            found = known | found
        if model.training and "random_in_training" not in found:
            found["random_in_training"] = check_no_dropout(model, scorer, device)
    if record is not None and found != known:
        write_check(record, key, found)
    if collectives.is_first():
        _logger.info("%s", settled)
    return settled.layout
