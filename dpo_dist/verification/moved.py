"""Whether an export is anything but the model that training began with."""

from collections.abc import Mapping

import torch

from dpo_dist.engine.weights.safetensors_reader import Place, read_places, read_tensor
from dpo_dist.metrics.writer import read_lines
from dpo_dist.model_files.adapter import ADAPTER_WEIGHTS_NAME
from dpo_dist.model_files.files import weight_files
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.run_dir import RunDir
from dpo_dist.verification.check import refuse
from dpo_dist.verification.exported import Exported


def check_moved(exported: Exported) -> str:
    """Raises VerificationError when every tensor is still what it was before training.

    Evidence that training moved is a step of metrics.jsonl with a gradient and a learning rate
    above 0; without one, as after a single step of warm-up, nothing is asked of the export.
    """
    last = exported.manifest.details["step"]
    lines = read_lines(RunDir(exported.config.run.dir).metrics_path, last)
    moving = sum(_positive(m, "grad_norm") and _positive(m, "learning_rate") for m in lines)
    if not moving:
        return "no step with a gradient and a learning rate above 0"
    changed = _first_changed(exported)
    if changed is None:
        told = (
            f"{moving} of {len(lines)} lines of metrics.jsonl have a gradient and a learning rate"
        )
        refuse([f"every weight is that of the start of training, to the bit, although {told}"])
    return f"{changed} is not that of the start of training"


def _positive(line: Mapping[str, float | None], name: str) -> bool:
    return (line.get(name) or 0.0) > 0


def _first_changed(exported: Exported) -> str | None:
    """The first tensor that differs from its start: the base's, an adapter's, or a fresh B of 0."""
    if exported.kind != "adapter":
        before = read_places(weight_files(exported.base_dir))
        return _first_difference(read_places(weight_files(exported.folder)), before)
    found = read_places([exported.folder / ADAPTER_WEIGHTS_NAME])
    start = RunModels(exported.config).start_adapter
    if start is not None:
        return _first_difference(found, read_places([start / ADAPTER_WEIGHTS_NAME]))
    # whatever else an adapter trains, B moves with it from the first step
    second = {n: place for n, place in found.items() if "lora_B" in n or "lora_embedding_B" in n}
    return next((name for name, place in second.items() if read_tensor(place).any()), None)


def _first_difference(found: Mapping[str, Place], before: Mapping[str, Place]) -> str | None:
    for name, place in found.items():
        if name not in before:
            return name
        now = read_tensor(place)
        if not torch.equal(now, read_tensor(before[name]).to(now.dtype)):
            return name
    return None
