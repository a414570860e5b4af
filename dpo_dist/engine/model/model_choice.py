"""Which model a name means: the base, an export of this run, or a folder or hub id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.model.load import load_model
from dpo_dist.engine.model.strict_load import load_adapted
from dpo_dist.errors import ArtifactError, ModelFilesError
from dpo_dist.model_files.adapter import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from dpo_dist.model_files.files import digest_of_weights, resolve_model_dir
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.run.run_dir import RunDir


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
    choice: ModelChoice,
    base_dir: Path,
    section: ModelSection,
    device: torch.device,
    zero3: dict[str, Any] | None = None,
) -> Any:
    """The model of a choice, `zero3` as for `load_model`.

    Raises ArtifactError when an adapter's file does not fit the base.
    """
    section = choice.section(section)
    if not choice.is_adapter:
        return load_model(choice.folder, section, device=device, zero3=zero3)
    model, problems = load_adapted(base_dir, choice.folder, section, device, zero3)
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
