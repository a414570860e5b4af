"""A checkpoint in memory: the trainable parameters of a model, named as the engine names them."""

from pathlib import Path
from typing import Any

import torch
from support.tiny_models import tiny_model
from torch import nn

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.export.weight_changes import POLICY
from dpo_dist.engine.model.adapters import add_adapter


class InMemory:
    """The two attributes of a checkpoint's reader, over tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def names_and_shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].float().clone()


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A base folder of a tiny model, as transformers writes it."""
    tiny_model(family, dtype=dtype).save_pretrained(folder)
    return folder


def randomly_trained(policy: Any) -> InMemory:
    """Moves every trainable parameter of a model, and hands them out as a checkpoint would.

    Adapters start as no change at all, so without the move a merge that does nothing would pass.
    """
    generator = torch.Generator().manual_seed(1)
    trained = {}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                # nn.Linear starts with small numbers: adapters are moved far beyond rounding
                parameter.add_(noise.to(parameter) * (0.4 if "lora_" in name else 0.2))
                trained[POLICY + name] = parameter.detach()
    return InMemory(trained)


def adapted(model: nn.Module, adapter: AdapterSection, base: Path) -> tuple[Any, InMemory]:
    """(peft's model with a trained adapter, its checkpoint)."""
    torch.manual_seed(3)
    policy = add_adapter(model, adapter, str(base))
    return policy.eval(), randomly_trained(policy)  # pyright: ignore[reportAttributeAccessIssue]
