"""No dropout in a policy: it would not be the model that the reference was scored with."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.layout_choice import NO_LEAK, synthetic_pairs
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.errors import ConfigError


def switch_off_dropout(model: nn.Module) -> None:
    """Sets to 0 what a module or the config calls drop- or jitter-something, and the p of drops.

    Families spell it in a dozen ways and read some of it only in forward; the jitter of a router
    is noise of the same kind.
    """
    for owner in (*_configs(base_of(model).config), *model.modules()):
        names = [name for name in vars(owner) if _is_random(name)]
        if "drop" in type(owner).__name__.lower():
            names.append("p")
        for name in names:
            if isinstance(getattr(owner, name, None), float):
                setattr(owner, name, 0.0)


@torch.no_grad()
def check_no_dropout(model: nn.Module, scorer: PairScorer, device: torch.device) -> float:
    """How far two forwards in training mode are apart, in nats per token; 0 as it should be.

    `model` is the scorer or the engine around it; all ranks call it together. An adapter's own
    dropout is off for it, and the mode is put back after. Raises ConfigError when they differ:
    something is random that `switch_off_dropout` did not reach.
    """
    base, training = base_of(scorer.policy), model.training
    packed = pack_pairs(synthetic_pairs(base.config.get_text_config()), device)
    model.train()
    for name, module in scorer.policy.named_modules():
        if "lora_dropout" in name:
            module.eval()
    try:
        first, second = (model(packed, scorer.layout) for _ in range(2))
    finally:
        model.train(training)
    apart = max(collectives.gather(((first - second).abs() / packed.lengths).max().item()))
    if not apart <= NO_LEAK[next(base.parameters()).dtype]:
        keys = sorted(
            {key for config in _configs(base.config) for key in vars(config) if _is_random(key)}
        )
        raise ConfigError(
            f"{type(base).__name__} is random in training mode: two forwards of the same pairs are "
            f"{apart:.1e} nats per token apart (of its config: {', '.join(keys) or 'no such key'})",
            "the same log-probs, as the reference was scored with",
            "Set these keys to 0 in the model's config.json, or use another model.",
        )
    return apart


def _is_random(name: str) -> bool:
    return "drop" in name.lower() or "jitter" in name.lower()


def _configs(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))
