"""Sections of a run config about the run's folder and what comes out of it."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dpo_dist.sections.section import PositiveInt, Section


class RunSection(Section):
    dir: Path = Field(description="Folder of this run; everything it writes lies inside.")
    seed: int = Field(42, ge=0, description="Seed of sample order, adapter init and dropout.")


class LoggingSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    every_steps: PositiveInt = Field(1, description="Optimizer steps between metric lines.")


class ExportSection(Section):
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of exported weights.")
    max_shard_size_mib: PositiveInt = Field(4096, description="MiB of one safetensors file.")
    checkpoint: Literal["auto", "newest", "best"] = Field(
        "auto", description="Which to export; auto: best where checkpoint.best_by is set."
    )
    merge: bool = Field(True, description="After LoRA also write the merged model.")


class GenerateSection(Section):
    num_prompts: PositiveInt = Field(3, description="Held-out prompts to answer.")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, tokens.")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Nucleus sampling; null: as the model's generation_config."
    )
    batch_size: PositiveInt = Field(8, description="Prompts that are answered together.")
