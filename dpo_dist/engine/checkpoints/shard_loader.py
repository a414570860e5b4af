"""DeepSpeed's own loading of a checkpoint, corrected where it is wrong."""

from pathlib import Path
from typing import Any

import torch

from dpo_dist.errors import CheckpointError


def load_shards(engine: Any, folder: Path) -> None:
    """Reads this rank's shards back into an engine of the same ranks, or a converted folder."""
    loaded, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, custom_load_fn=_load_trainable
    )
    assert loaded is not None, f"no shards in {folder}"


def own_step_counts(engine: Any) -> None:
    """Gives every sub-group of ZeRO-3 a step count of its own, where its optimizer wants it.

    DeepSpeed hands one CPU tensor to all of them: torch's AdamW would count it up once a
    sub-group, and its fused form takes counts on the device of the parameters only.
    """
    optimizer = engine.optimizer.optimizer
    fused = bool(optimizer.defaults.get("fused"))
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            device = parameter.device if fused else torch.device("cpu")
            state["step"] = state["step"].detach().clone().to(device)


def _load_trainable(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Loads a module's weights, of which only frozen ones may be missing."""
    result = dst.load_state_dict(src, strict=False)
    parameters = dst.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    wrong = [*sorted(set(result.missing_keys) - frozen), *result.unexpected_keys]
    if wrong:
        raise CheckpointError(
            f"the checkpoint and the model disagree about {wrong[0]} ({len(wrong)} parameters)",
            "the trainable parameters of this model",
            "Resume with the model and adapter settings that wrote the checkpoint.",
        )
