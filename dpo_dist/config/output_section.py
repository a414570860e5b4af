"""Sections of a run config about the run folder and what comes out of it."""

from typing import Annotated, Literal

from pydantic import Field

from dpo_dist.config.section import FilePath, Interval, PositiveInt, Section

StepName = Annotated[str, Field(pattern=r"^step-\d{6,}$")]


class RunSection(Section):
    dir: FilePath = Field(description="Folder for everything that this run writes.")
    seed: int = Field(
        42, ge=0, description="Seed for sample order, adapter initialization, dropout and sampling."
    )


class LoggingSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    every_steps: Interval = Field(
        1, description="Optimizer steps between metric lines; below 1, their share of all steps."
    )
    wandb: bool = Field(False, description="Send metrics to Weights & Biases as well.")
    wandb_project: str = Field("dpo-dist", description="Weights & Biases project.")
    wandb_name: str | None = Field(
        None, description="Weights & Biases run name; defaults to that of run.dir."
    )


class ExportSection(Section):
    dtype: Literal["bfloat16", "float32", "float16", "auto"] = Field(
        "bfloat16",
        description="Dtype of exported weights; auto keeps that of each tensor in the base.",
    )
    max_shard_size_mib: PositiveInt = Field(4096, description="Maximum MiB per safetensors file.")
    checkpoint: Literal["auto", "newest", "best"] | StepName = Field(
        "auto",
        description="Which to export once training ended: the best (auto, with checkpoint.best_by) "
        "or the newest; or one by name at any time, such as step-000400.",
    )
    merge: bool = Field(True, description="After LoRA, write the merged model as well.")
    base_model: str | None = Field(
        None, description="Hub id of the base in adapter and model card; defaults to model.path."
    )
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Repository (owner/name) for the verified export; null pushes nothing.",
    )
    hub_private: bool = Field(
        True, description="Create a private repository, and refuse a public one."
    )
    hub_revision: str | None = Field(None, description="Branch to push to; defaults to main.")
    hub_folder: Literal["auto", "full", "merged", "adapter"] = Field(
        "auto", description="Export to push; auto takes the whole model if there is one."
    )


class GenerateSection(Section):
    num_prompts: PositiveInt = Field(3, description="Held-out prompts to answer.")
    max_new_tokens: PositiveInt = Field(128, description="Maximum tokens per answer.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 decodes greedily.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Nucleus sampling; null follows the model's generation_config.",
    )
    batch_size: PositiveInt = Field(8, description="Prompts to answer at once.")
