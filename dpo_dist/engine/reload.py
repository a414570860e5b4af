"""Loading an export as its users do, and saying what does not fit instead of passing it over."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dpo_dist.adapter_files import ADAPTER_WEIGHTS_NAME
from dpo_dist.engine.load import load_model
from dpo_dist.engine.safetensors_stream import read_places, read_tensor
from dpo_dist.errors import ArtefactError
from dpo_dist.model_files import weight_files
from dpo_dist.run_dir import RunDir
from dpo_dist.sections.training import ModelSection

REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def stored_names(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the weight files of a folder."""
    return {name: place.spec.shape for name, place in read_places(weight_files(model_dir)).items()}


def load_export(paths: RunDir, base_dir: Path, section: ModelSection, device: torch.device) -> Any:
    """The exported model to use: full, merged, or the adapter on the base.

    Raises ArtefactError when nothing is exported or an adapter's file does not fit the base.
    """
    for merged in (True, False):
        if (folder := paths.model_dir(merged)).is_dir():
            return load_model(folder, section, device=device)
    if not paths.adapter_dir.is_dir():
        raise ArtefactError(
            f"{paths.export_dir} holds no model", "an export", "Run `dpo-dist export` first."
        )
    model, problems = load_adapted(base_dir, paths.adapter_dir, section, device)
    if problems:
        raise ArtefactError(
            f"{paths.adapter_dir} does not fit {base_dir}: {problems[0]} ({len(problems)} in all)",
            "the adapter of this base model",
            f"Delete {paths.export_dir} and run `dpo-dist export` again.",
        )
    return model


def load_whole(
    folder: Path, section: ModelSection, device: torch.device, unread: Collection[str] = ()
) -> tuple[Any, list[str]]:
    """(model in `section.dtype`, everything that transformers reports about its weights).

    `unread` are tensors that loading the base model leaves aside as well.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, section.dtype),
        trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    problems = [
        f"{kind.replace('_', ' ')}: {item}"
        for kind in REPORTED
        for item in sorted(report.get(kind, ()), key=str)
        if kind != "unexpected_keys" or item not in unread
    ]
    return model.to(device).eval(), problems


def load_adapted(
    base_dir: Path, folder: Path, section: ModelSection, device: torch.device
) -> tuple[Any, list[str]]:
    """(base model with the adapter, where it differs from the adapter's file).

    peft only warns about names that it does not find, and leaves fresh weights in their place.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base: Any = load_model(base_dir, section, device=device)
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
    return model.to(device).eval(), problems
