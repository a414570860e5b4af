"""Sections of a run config about the run's folder and what comes out of it."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dpo_dist.config.section import PositiveInt, Section


class RunSection(Section):
    dir: Path = Field(description="Folder of this run; everything it writes lies inside.")
    seed: int = Field(42, ge=0, description="Seed of sample order, adapter init and dropout.")


class LoggingSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    every_steps: PositiveInt = Field(1, description="Optimizer steps between metric lines.")
    wandb: bool = Field(False, description="Send metrics to Weights & Biases too.")
    wandb_project: str = Field("dpo-dist", description="Project there.")
    wandb_name: str | None = Field(
        None, description="Name of the run there; the run folder's by default."
    )


class ExportSection(Section):
    dtype: Literal["bfloat16", "float32", "float16", "auto"] = Field(
        "bfloat16", description="Of exported weights; auto: each tensor as the base stores it."
    )
    max_shard_size_mib: PositiveInt = Field(4096, description="MiB of one safetensors file.")
    checkpoint: Literal["auto", "newest", "best"] = Field(
        "auto", description="Which to export; auto: best where checkpoint.best_by is set."
    )
    merge: bool = Field(True, description="After LoRA also write the merged model.")
    base_model: str | None = Field(
        None, description="Hub id that adapter and card name as base; model.path by default."
    )
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Push the verified export to this repository, owner/name; null: nowhere.",
    )
    hub_private: bool = Field(True, description="Make and want a private repository.")
    hub_revision: str | None = Field(None, description="Branch to push to; main by default.")
    hub_folder: Literal["auto", "full", "merged", "adapter"] = Field(
        "auto", description="Export to push; auto: the whole model if there is one."
    )


class GenerateSection(Section):
    num_prompts: PositiveInt = Field(3, description="Held-out prompts to answer.")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, tokens.")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Nucleus sampling; null: as the model's generation_config."
    )
    batch_size: PositiveInt = Field(8, description="Prompts that are answered together.")
