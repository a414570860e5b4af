"""A stage of a tiny llama run on a rank of its own that notes what goes through the model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.engine.checkpoints.host_copies import HostCopies
from dpo_dist.metrics.writer import read_lines
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import scoring_contract, store_root
from dpo_dist.reference.store import ReferenceStore, open_store
from dpo_dist.run.run_dir import RunDir, step_of


@dataclass(frozen=True)
class Run:
    """A run, and the forwards of its last stage."""

    config: RunConfig
    forwards: Mapping[str, Any]

    @property
    def paths(self) -> RunDir:
        return RunDir(self.config.run.dir)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.paths.metrics_path)

    def steps_with(self, metric: str) -> list[int]:
        return [line["step"] for line in self.lines if metric in line]

    @property
    def samples(self) -> list[dict[str, Any]]:
        path = self.paths.samples_path
        return read_lines(path) if path.exists() else []

    @property
    def steps_kept(self) -> list[int]:
        return sorted(step_of(path) or 0 for path in self.paths.checkpoints_dir.glob("step-*"))

    @property
    def last_checkpoint(self) -> Path:
        return self.paths.checkpoint_dir(self.steps_kept[-1])

    @property
    def store(self) -> ReferenceStore:
        return open_store(
            store_root(self.config), scoring_contract(RunModels(self.config), "packed")
        )

    def sent_to_wandb(self, text: str) -> bool:
        stored = [path.read_bytes() for path in self.paths.wandb_dir.rglob("*.wandb")]
        return any(text.encode() in content for content in stored)


def watched(stage: str, run_yaml: str, overrides: list[str]) -> dict[str, Any]:
    """Runs a stage on this rank; the pairs of its forwards, and where it stored reference rows."""
    from torch.nn.modules import module as hooks

    from dpo_dist.stages import reference, train

    seen: dict[str, Any] = {"trained": [], "scored": [], "sharded": False, "recomputed": False}
    seen |= {"most_in_mlp": 0, "offloaded": False}
    training_forward = False

    def before(module: Any, inputs: Any) -> None:
        nonlocal training_forward
        name = type(module).__name__
        if name == "PairScorer" and inputs[1] is None:  # not the self-check of a layout
            training_forward = torch.is_grad_enabled()
            seen["trained" if training_forward else "scored"].append(pairs_in(inputs[0]))
            seen["sharded"] |= any(hasattr(p, "ds_id") for p in module.parameters())
        elif name == "SiLUActivation" and training_forward:
            seen["most_in_mlp"] = max(seen["most_in_mlp"], inputs[0].shape[1])
        elif name == "LlamaAttention":
            # activations that will be recomputed come from a forward without gradients
            seen["recomputed"] |= training_forward and not torch.is_grad_enabled()

    def after(module: Any, inputs: Any, output: Any) -> None:
        nonlocal training_forward
        if type(module).__name__ == "PairScorer":
            training_forward = False

    def copy(copies: HostCopies, state_dict: Any) -> Any:
        seen["behind"] = True
        return own_copy(copies, state_dict)

    class SeenHooks(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *packing: Any) -> None:
            seen["offloaded"] = True
            super().__init__(*packing)

    torch.autograd.graph.saved_tensors_hooks = SeenHooks
    own_copy, HostCopies.copy, seen["behind"] = HostCopies.copy, copy, False
    hooks.register_module_forward_pre_hook(before)
    hooks.register_module_forward_hook(after)
    os.chdir(Path(run_yaml).parent)
    there = set(Path().rglob("*.rows"))
    {"reference": reference, "train": train}[stage].run(load_config(Path(run_yaml), overrides))
    seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return seen | {"stores": sorted({p.parts[0] for p in {*Path().rglob("*.rows")} - there})}


def pairs_in(packed: Any) -> list[list[int]]:
    """The tokens of each packed group of pairs."""
    sizes = [sum(lengths) for lengths in packed.part_lengths]
    return [part.tolist() for part in packed.input_ids[0].split(sizes)]
