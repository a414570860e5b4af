"""The stages of a run in order, and the command of one rank of each."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo_dist.config.run_config import RunConfig
from dpo_dist.errors import ConfigError

StageName = Literal[
    "doctor", "prepare", "reference", "train", "export", "verify", "push", "evaluate", "generate"
]


@dataclass(frozen=True)
class Stage:
    """`dpo_dist/stages/NAME.py`; `distributed` stages run on all ranks, the others on one."""

    name: StageName
    distributed: bool
    purpose: str


DOCTOR = Stage("doctor", True, "versions, GPUs, disk and network of the nodes")
PREPARE = Stage("prepare", False, "preference rows -> tokenized pairs")
REFERENCE = Stage("reference", True, "pairs -> reference log-probs")
TRAIN = Stage("train", True, "DPO -> checkpoints, metrics")
EXPORT = Stage("export", False, "newest or best checkpoint -> Hugging Face folders")
VERIFY = Stage("verify", True, "a fresh load reproduces the probe")
PUSH = Stage("push", False, "verified export -> the Hugging Face Hub")
EVALUATE = Stage("evaluate", True, "held-out accuracy and margin of the export")
GENERATE = Stage("generate", False, "answers of base and export side by side")

STAGES = (PREPARE, REFERENCE, TRAIN, EXPORT, VERIFY)  # of every run, in order
SUBMITTED = (DOCTOR, *STAGES, PUSH)  # what a launcher runs in a job
ALL_STAGES = (*SUBMITTED, EVALUATE, GENERATE)


def stage_argv(stage: str, config_path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command of one rank of a stage; its place in the job comes through the environment."""
    return [sys.executable, "-m", "dpo_dist", stage, str(config_path), *overrides]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run; it pushes only when asked."""
    return (*STAGES, *((PUSH,) if config.export.push_to_hub else ()))


def submitted_stage(name: str) -> Stage:
    """The stage that a job of a launcher is told to run; raises ConfigError for another name."""
    for stage in SUBMITTED:
        if stage.name == name:
            return stage
    raise ConfigError(
        f"stage {name!r}", f"one of {' '.join(stage.name for stage in SUBMITTED)}",
        "Correct it, or DPO_STAGES if it comes from there.",
    )  # fmt: skip
