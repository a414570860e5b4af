"""Trained adapters as peft saves them, for runs that start from one."""

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import tiny_model
from support.weights.trained_weights import adapted

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.model_files.adapter import ADAPTER_CONFIG_NAME

IDS = torch.arange(3, 40)[None]


def save_adapter(folder: Path, base: Path, family: str, **settings: Any) -> tuple[Path, Any]:
    """(folder of a trained adapter as peft saves it, the policy it comes from)."""
    section = AdapterSection.model_validate({"rank": 3, "alpha": 4.0} | settings)
    policy, _ = adapted(tiny_model(family), section, base)
    policy.save_pretrained(folder, save_embedding_layers=False)
    return edited(folder, base_model_name_or_path=str(base)), policy


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / ADAPTER_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits
