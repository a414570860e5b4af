"""Loading an export as its users do, and saying what does not fit instead of passing it over."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.model.load import load_model, partitioned_loading
from dpo_dist.engine.weights.safetensors_reader import TensorSpec, read_places, read_tensor
from dpo_dist.model_files.adapter import ADAPTER_WEIGHTS_NAME
from dpo_dist.model_files.files import weight_files

# of what transformers reports on loading, whatever is not as it should be
REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def stored_specs(model_dir: Path) -> dict[str, TensorSpec]:
    """Names, shapes and types in the weight files of a folder."""
    return {name: place.spec for name, place in read_places(weight_files(model_dir)).items()}


def load_whole(
    folder: Path,
    section: ModelSection,
    device: torch.device,
    unread: Collection[str] = (),
    zero3: dict[str, Any] | None = None,
) -> tuple[Any, list[str]]:
    """(model in `section.dtype`, everything that transformers reports about its weights).

    `unread` are tensors that loading the base model leaves aside as well. `zero3` as for
    `load_model`; a model that does not fit is then not loaded, on any rank, and None.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": getattr(torch, section.dtype),
        "trust_remote_code": section.trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
    }

    def load(**more: Any) -> tuple[Any, list[str]]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options, **more)
        model, report = loaded
        return model, [
            f"{kind.replace('_', ' ')}: {item}"
            for kind in REPORTED
            for item in sorted(report.get(kind, ()), key=str)
            if kind != "unexpected_keys" or item not in unread
        ]

    if zero3 is None:
        model, problems = load()
        return model.to(device).eval(), problems
    # of partitions transformers reports little, and on rank 0 alone; of headers all, everywhere
    _, problems = load(device_map={"": "meta"})
    if problems:
        return None, problems
    with partitioned_loading(zero3):
        model, _ = load()
    return model.eval(), []


def load_adapted(
    base_dir: Path,
    folder: Path,
    section: ModelSection,
    device: torch.device,
    zero3: dict[str, Any] | None = None,
) -> tuple[Any, list[str]]:
    """(base model with the adapter, where it differs from the adapter's file).

    peft only warns about names that it does not find, and leaves fresh weights in their place.
    `zero3` as for `load_model`: the adapter itself is whole until an engine starts.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base: Any = load_model(base_dir, section, device=device, zero3=zero3)
    with partitioned_loading(None if section.quantization else zero3):
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    places = read_places([folder / ADAPTER_WEIGHTS_NAME])
    problems = [f"not in the file: {name}" for name in loaded if name not in places]
    problems += [f"not in the model: {name}" for name in places if name not in loaded]
    for name in places:
        if name in loaded:
            stored = read_tensor(places[name]).to(loaded[name].dtype)
            if not torch.equal(stored, loaded[name].detach().cpu()):
                problems.append(f"not the file's values: {name}")
    return (model if zero3 is not None else model.to(device)).eval(), problems
