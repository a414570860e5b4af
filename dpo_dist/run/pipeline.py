"""The stages of a run in order, and the command of one rank of each."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.run_config import RunConfig


@dataclass(frozen=True)
class Stage:
    """One step of the plan; `distributed` stages run on all ranks, the others on one."""

    name: str
    distributed: bool
    purpose: str


STAGES = (
    Stage("prepare", False, "preference rows -> tokenized pairs"),
    Stage("reference", True, "pairs -> reference log-probs"),
    Stage("train", True, "DPO -> checkpoints, metrics"),
    Stage("export", False, "newest or best checkpoint -> Hugging Face folders"),
    Stage("verify", False, "a fresh load reproduces the probe"),
)


PUSH = Stage("push", False, "verified export -> the Hugging Face Hub")


DOCTOR = Stage("doctor", True, "versions, GPUs, disk and network of the nodes")


EVALUATE = Stage("evaluate", True, "held-out accuracy and margin of the export")


GENERATE = Stage("generate", False, "answers of base and export side by side")


def stage_argv(stage: str, config_path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command of one rank of a stage; its place in the job comes through the environment."""
    return [sys.executable, "-m", "dpo_dist", stage, str(config_path), *overrides]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run; it pushes only when asked."""
    return (*STAGES, *((PUSH,) if config.export.push_to_hub else ()))
