"""Loading an export as its users do, and saying what does not fit instead of passing it over."""

from pathlib import Path
from typing import Any

import torch

from dpo_dist.config import ModelSection
from dpo_dist.engine.adapters import ADAPTER_NAME
from dpo_dist.engine.export import ADAPTER_WEIGHTS_NAME
from dpo_dist.engine.load import load_model
from dpo_dist.engine.safetensors_stream import read_places, read_tensor

REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def load_whole(folder: Path, section: ModelSection, device: torch.device) -> tuple[Any, list[str]]:
    """(model in `section.dtype`, what transformers reports about the weights)."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, section.dtype),
        trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    problems = [
        f"{kind.replace('_', ' ')}: {item}" for kind in REPORTED for item in sorted(report.get(kind, ()), key=str)
    ]  # fmt: skip
    return model.to(device).eval(), problems


def load_adapted(
    base_dir: Path, folder: Path, section: ModelSection, device: torch.device
) -> tuple[Any, list[str]]:
    """(base model with the adapter, in what the two differ from the adapter's file).

    peft only warns about names that it does not find, and leaves fresh weights in their place.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base: Any = load_model(base_dir, section, device=device)
    model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    places = read_places([folder / ADAPTER_WEIGHTS_NAME])
    problems = [f"missing from the file: {name}" for name in loaded if name not in places]
    problems += [f"not in the model: {name}" for name in places if name not in loaded]
    for name in sorted(set(loaded) & set(places)):
        stored = read_tensor(places[name]).to(loaded[name].dtype)
        if not torch.equal(stored, loaded[name].detach().cpu()):
            problems.append(f"loaded with other values: {name}")
    assert ADAPTER_NAME in model.peft_config, list(model.peft_config)
    return model.to(device).eval(), problems
