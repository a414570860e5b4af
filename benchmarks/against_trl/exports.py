"""Memory and bytes of an export: ours against DeepSpeed's zero_to_fp32 and peft's merge_and_unload.

Both exports are made from one optimizer step under ZeRO-2, of all parameters and of an adapter.
Memory is the most that is resident beyond the imports, files that are mapped among it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.against_trl.measured import MIB, forget_peak, memory_mib
from benchmarks.against_trl.processes import one
from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.checkpoints import saving
from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.export.weight_changes import adapter_changes, full_changes
from dpo_dist.engine.export.weight_streams import adapter_weights, model_weights, plan_model
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.model.adapters import add_adapter, write_adapter_config
from dpo_dist.engine.model.policy import PolicyParts, build_policy
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.engine.weights.base_weights import build_skeleton, open_base
from dpo_dist.engine.weights.safetensors_writer import write_file, write_shards
from dpo_dist.model_files.adapter import ADAPTER_WEIGHTS_NAME
from dpo_dist.run.topology import from_environment

SHARD_BYTES = 1 << 30
TAG = "step"


def measure(model: Path, folder: Path) -> dict[str, Any]:
    """name -> figures of both ways, in turn."""
    results: dict[str, Any] = {}
    for kind, theirs, name in (
        ("full", zero_to_fp32, "zero_to_fp32"),
        ("adapter", merge_and_unload, "merge_and_unload"),
    ):
        place = folder / kind
        one(make_checkpoints, str(model), kind == "adapter", str(place))
        results[name] = {
            "theirs": one(_measured, theirs, str(model), str(place)),
            "ours": one(_measured, ours, str(model), str(place)),
        }
    return results


def make_checkpoints(model: str, adapter: bool, folder: str) -> dict[str, Any]:
    """Our checkpoint, DeepSpeed's, and the adapter as peft reads it, after one step."""
    topology, place = from_environment(), Path(folder)
    with collectives.process_group(topology) as device:
        train = TrainSection.model_validate(
            {"deepspeed": "zero2", "learning_rate": 1e-3, "gradient_checkpointing": False}
        )
        config = ds_config.training_config(train, "float32", topology.world_size)
        section = ModelSection.model_validate({"path": model, "dtype": "float32"})
        parts = PolicyParts(Path(model), section, AdapterSection() if adapter else None)
        engine, _ = build_policy(parts, train, config, num_steps=10, device=device, seed=0)
        scores = score_pairs(engine, pack_pairs([([5, 6, 7], [8, 9], [4])]))
        zero.backward(engine, scores[:, 1].sum() - scores[:, 0].sum(), last=True, world_size=1)
        zero.update(engine)
        state = TrainState(1, 1, 1.0, {}, topology.world_size, 2)
        probe = np.array([0]), np.array([[-1.0, -2.0]], dtype=np.float32)
        saved = saving.save(engine, place / "checkpoints", state, *probe, keep=2)
        if adapter:
            _write_adapter(model, saved, place / "adapter")
        else:
            engine.save_checkpoint(str(place / "deepspeed"), tag=TAG)
        zero.take_down(engine)
    return {}


def _write_adapter(model: str, checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    policy = add_adapter(build_skeleton(Path(model)), AdapterSection(), model)
    with open_checkpoint(checkpoint, verified=True) as trained:
        stream = adapter_weights(policy, trained, torch.float32)
        write_file(folder / ADAPTER_WEIGHTS_NAME, stream)
    write_adapter_config(policy, folder, model, None)


def _measured(work: Callable[[Path, Path, Path], None], model: str, folder: str) -> dict[str, Any]:
    output = Path(folder, work.__name__)
    output.mkdir()
    before = memory_mib(peak=False)
    forget_peak()
    start = time.perf_counter()
    work(Path(model), Path(folder), output)
    weights = [p for p in output.iterdir() if p.suffix in (".safetensors", ".bin")]
    return {
        "seconds": time.perf_counter() - start,
        "mib": memory_mib(peak=True) - before,
        "written_mib": sum(path.stat().st_size for path in weights) / MIB,
    }


def ours(model: Path, folder: Path, output: Path) -> None:
    """What the export stage streams, in the types of the base model."""
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    base = open_base(model)
    with open_checkpoint(checkpoint, verified=True) as trained:
        if (folder / "adapter").exists():
            policy = add_adapter(build_skeleton(model), AdapterSection(), str(model))
            changes = adapter_changes(base, policy, trained)
        else:
            changes = full_changes(base, trained)
        stream = model_weights(plan_model(base, changes, None), trained)
        write_shards(output, stream, SHARD_BYTES)


def zero_to_fp32(model: Path, folder: Path, output: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    # a pickle, as by default: its safetensors refuse tied weights
    convert_zero_checkpoint_to_fp32_state_dict(str(folder / "deepspeed"), str(output), tag=TAG)


def merge_and_unload(model: Path, folder: Path, output: Path) -> None:
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(str(output))
