"""Where training stood when a checkpoint was written, and whether a run may continue from it."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from dpo_dist.errors import CheckpointError
from dpo_dist.metrics.evaluations import Evaluation
from dpo_dist.parsing import parse_as
from dpo_dist.run.manifest import differences
from dpo_dist.run.run_dir import TRAIN_STATE_NAME

NAMED_VERSIONS = ("torch", "deepspeed", "transformers", "peft")


def installed_versions() -> dict[str, str]:
    """Versions that explain a number which differs after a resume."""
    return {"python": platform.python_version()} | {name: version(name) for name in NAMED_VERSIONS}


@dataclass(frozen=True)
class TrainState:
    """What a resume needs beside the shards; a checkpoint's train_state.json."""

    step: int  # optimizer steps done
    consumed_pairs: int
    epoch: float
    digests: Mapping[str, str]  # settings and digests of inputs that must not change
    world_size: int
    zero_stage: int
    evaluations: Sequence[Evaluation] = ()  # of the run so far, by step
    skipped_steps: Sequence[int] = field(
        default_factory=list[int]
    )  # among those done: their gradient was not finite
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def to_json(self) -> str:
        """Indented JSON that `read_train_state` reads back."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_train_state(step_dir: Path) -> TrainState:
    """Reads a checkpoint's state; raises CheckpointError when it is missing or not readable."""
    path = step_dir / TRAIN_STATE_NAME
    try:
        return parse_as(TrainState, path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not readable ({error})",
            "the state of a checkpoint",
            "Use another checkpoint, or train anew.",
        ) from None


def check_resume(step_dir: Path, state: TrainState, digests_now: Mapping[str, str]) -> None:
    """Raises CheckpointError naming every setting and input that changed since the checkpoint."""
    found = differences(state.digests, digests_now)
    if found:
        raise CheckpointError(
            f"{step_dir} was trained with other settings or inputs ({'; '.join(found)})",
            "those of this run config",
            "Put them back to continue, or choose another run.dir to train anew.",
        )


def check_stage(step_dir: Path, state: TrainState, zero_stage: int) -> None:
    """Raises CheckpointError when the shards are laid out for another ZeRO stage."""
    if state.zero_stage != zero_stage:
        raise CheckpointError(
            f"{step_dir} holds shards of ZeRO stage {state.zero_stage}, train.deepspeed is of "
            f"stage {zero_stage}",
            f"stage {state.zero_stage}",
            "Choose a train.deepspeed of that stage to continue.",
        )
