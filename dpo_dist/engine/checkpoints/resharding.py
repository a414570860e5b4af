"""A resume on another number of ranks: each rank reads its own share of the old ranks' shards.

Nothing is converted on disk, and no rank waits for another. DeepSpeed restores an engine built with
checkpoint.load_universal one parameter at a time, from files of their own. They are not made: what
it would read of them comes straight out of the shards, and only the bytes that this rank keeps.

    DeepSpeed reads             it gets
    *_model_states.pt           counters and the schedule, without the weights
    zero/optimizer_state.pt     settings of the optimizer, without its vectors
    zero/PARAMETER/STATE.pt     the elements [start, start + numel) of fp32, exp_avg, exp_avg_sq
"""

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from dpo_dist.engine.checkpoints.shard_loader import load_shards, own_step_counts
from dpo_dist.engine.checkpoints.shard_reader import (
    MOMENTS,
    ShardedCheckpoint,
    base_state,
    model_states_name,
    open_checkpoint,
    optim_states_name,
)
from dpo_dist.engine.checkpoints.train_state import read_train_state
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError

RESHARDABLE = "adamw"  # its two moments are vectors of the parameter's length, found by name
SETTINGS = {"loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version"}


def needs_resharding(step_dir: Path | None, world_size: int) -> bool:
    """Whether a checkpoint's shards are cut for another number of ranks than `world_size`.

    The DeepSpeed config then needs checkpoint.load_universal before the engine is built. Stage 0
    has no shards, so any number of ranks reads it. Raises CheckpointError when the state of the
    optimizer cannot be cut anew.
    """
    if step_dir is None:
        return False
    state = read_train_state(step_dir)
    if state.zero_stage == 0 or state.world_size == world_size:
        return False
    optimizer = state.digests.get("train.optimizer", RESHARDABLE)
    if optimizer != RESHARDABLE:
        raise CheckpointError(
            f"{step_dir} holds the state of {optimizer} on {state.world_size} ranks, and only that "
            f"of {RESHARDABLE} can be cut for another number",
            f"{state.world_size} ranks, not {world_size}",
            f"Continue on {state.world_size} ranks.",
        )
    return True


def load_resharded(engine: Any, step_dir: Path) -> None:
    """Reads this rank's share of a verified checkpoint that other ranks wrote.

    Raises CheckpointError when a shard is not of a known layout.
    """
    stage = read_train_state(step_dir).zero_stage
    with (
        open_checkpoint(step_dir, verified=True, moments=True) as shards,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = Path(scratch) / step_dir.name
        step_count = _write_small_files(step_dir, folder, stage)
        optimizer = engine.optimizer
        if stage == 3:
            optimizer.load_hp_checkpoint_state = functools.partial(_share, shards, optimizer)
        else:
            for parameter in (p for group in optimizer.bit16_groups for p in group):
                parameter.load_hp_checkpoint_state = functools.partial(
                    _fill_fragment, shards, optimizer.param_names[parameter], parameter, step_count
                )
        load_shards(engine, folder)
        own_step_counts(engine)


def _write_small_files(step_dir: Path, folder: Path, stage: int) -> Any:
    """Writes what every rank needs as a whole, some kilobytes; returns the count of AdamW's steps.

    The shards are mapped, so that nothing is read of their vectors.
    """
    (folder / "zero").mkdir(parents=True)
    load = functools.partial(torch.load, mmap=True, map_location="cpu", weights_only=False)
    name = model_states_name(stage)
    torch.save(load(step_dir / name) | {"module": {}}, folder / name)
    names = {path.name for path in step_dir.iterdir()}
    optimizer = load(step_dir / optim_states_name(names, 0))["optimizer_state_dict"]
    base = base_state(optimizer)
    step_count = base["state"][0].get("step")
    whole = {key: value for key, value in optimizer.items() if key in SETTINGS}
    groups = {"param_groups": base["param_groups"]}
    whole |= groups | {"optimizer_state_dict": {"state": {0: {"step": step_count}}} | groups}
    torch.save(whole, folder / "zero" / "optimizer_state.pt")
    return step_count


def _share(
    shards: ShardedCheckpoint, optimizer: Any, folder: str, state: str, param: Any
) -> torch.Tensor:
    """Stage 3: this rank's ceil(n / W) elements of a parameter of n, padded with zeros."""
    rank, world_size = collectives.place()
    name, total = optimizer.param_names[param], param.ds_numel
    numel = math.ceil(total / world_size)
    start = min(rank * numel, total)
    part = shards.read_part(name, start, min(numel, total - start), state)
    return torch.nn.functional.pad(part, (0, numel - len(part)))


def _fill_fragment(
    shards: ShardedCheckpoint, name: str, parameter: Any, step_count: Any, *_: Any, **__: Any
) -> Any:
    """Stages 1 and 2: the elements of a parameter in this rank's part of its group."""
    mapping = parameter._hp_mapping
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    mapping.get_hp_fragment().data.copy_(shards.read_part(name, start, numel))
    mapping.optim_fragment = {
        moment: shards.read_part(name, start, numel, moment) for moment in MOMENTS
    }
    return step_count
