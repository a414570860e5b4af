"""Loading an export as its users do, and saying what does not fit instead of passing it over."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.model.load import load_model
from dpo_dist.engine.weights.safetensors_stream import TensorSpec, read_places, read_tensor
from dpo_dist.errors import ArtifactError, ModelFilesError
from dpo_dist.model_files.adapter import ADAPTER_WEIGHTS_NAME
from dpo_dist.model_files.files import digest_of_weights, resolve_model_dir, weight_files
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.run.run_dir import RunDir

ADAPTER_CONFIG_NAME = "adapter_config.json"
REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def stored_specs(model_dir: Path) -> dict[str, TensorSpec]:
    """Names, shapes and types in the weight files of a folder."""
    return {name: place.spec for name, place in read_places(weight_files(model_dir)).items()}


@dataclass(frozen=True)
class ModelChoice:
    """A model to use: a whole one, or an adapter on the run's base.

    `as_trained` is what is loaded with the run's quantization: an adapter, and the base unless
    there is a whole export to compare it with, which has left quantization behind.
    """

    name: str
    folder: Path
    is_adapter: bool = False
    as_trained: bool = False

    def section(self, section: ModelSection) -> ModelSection:
        """The run's model section as this model is loaded with it."""
        return section if self.as_trained else section.model_copy(update={"quantization": None})


def choose_model(which: str, paths: RunDir, base_dir: Path) -> ModelChoice:
    """`base`, an exported `full`, `merged` or `adapter`, `export` (what there is), or a path.

    A path is a folder of a whole model or of an adapter of this base, or a hub id. Raises
    ArtifactError when it is not exported, ModelFilesError when a path holds no model.
    """
    exported = {
        "merged": ModelChoice("merged", paths.model_dir(True)),
        "full": ModelChoice("full", paths.model_dir(False)),
        "adapter": ModelChoice("adapter", paths.adapter_dir, is_adapter=True, as_trained=True),
    }
    there = [choice for choice in exported.values() if choice.folder.is_dir()]
    if which == "base":
        return ModelChoice("base", base_dir, as_trained=all(c.is_adapter for c in there))
    if which == "export":
        if not there:
            raise ArtifactError(
                f"{paths.export_dir} holds no model", "an export", "Run `dpo-dist export` first."
            )
        return there[0]
    if which in exported:
        if exported[which] not in there:
            names = ", ".join(choice.name for choice in there) or "nothing"
            raise ArtifactError(
                f"{paths.export_dir} holds {names}, not {which}",
                f"an exported {which} model",
                "Run `dpo-dist export`, or name another model.",
            )
        return exported[which]
    folder = Path(which).expanduser()
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return ModelChoice(folder.name, folder.resolve(), is_adapter=True, as_trained=True)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelFilesError(
            f"{which} has neither config.json nor {ADAPTER_CONFIG_NAME}",
            "the folder of a model or of an adapter",
            "Name another folder, or base, export, merged, full or adapter.",
        )
    return ModelChoice(folder.name, resolve_model_dir(which))


def load_chosen(
    choice: ModelChoice, base_dir: Path, section: ModelSection, device: torch.device
) -> Any:
    """The model of a choice; raises ArtifactError when an adapter's file does not fit the base."""
    section = choice.section(section)
    if not choice.is_adapter:
        return load_model(choice.folder, section, device=device)
    model, problems = load_adapted(base_dir, choice.folder, section, device)
    if problems:
        raise ArtifactError(
            f"{choice.folder} does not fit {base_dir}: {problems[0]} ({len(problems)} in all)",
            "the adapter of this base model",
            f"Delete {choice.folder.parent} and run `dpo-dist export` again.",
        )
    return model


def digest_of_chosen(choice: ModelChoice, base_dir: Path, section: ModelSection) -> str:
    """Identity of a choice's weights as they are loaded; an adapter's includes its base's."""
    section, names = choice.section(section), (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
    files = [choice.folder / name for name in names if choice.is_adapter]
    whole = base_dir if choice.is_adapter else choice.folder
    parts = [digest_of_weights(whole, section.allow_pickle_weights), *map(digest_of_file, files)]
    parts += [section.quantization] if section.quantization else []
    return digest_of(parts) if len(parts) > 1 else parts[0]


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
