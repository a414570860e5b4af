"""A model that only scores: whole on every rank where it fits, else in ZeRO-3 partitions.

The reference pass, evaluate and verify open theirs here, all as `reference.sharding` says.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import join_team
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.engine.model.tiled_mlp import tile_mlps
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.inputs.setup import count_shape, make_setup, sharding_named
from dpo_dist.model_files.files import weight_files
from dpo_dist.planning.memory_resident import parameter_sizes
from dpo_dist.planning.sizes import GIB, total
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import Topology

_logger = logging.getLogger(__name__)
WHOLE_MODEL_SHARE = 0.7  # of a rank's memory for whole weights; the rest is for activations


@dataclass(frozen=True)
class Placement:
    """Where a frozen model lies."""

    device: torch.device
    zero3: dict[str, Any] | None = None  # DeepSpeed's config; None: whole on every rank
    tiled_mlp: int | None = None  # tokens of a tile, as in training
    sequence_parallel: int = 1  # ranks that share a row, as in training


@dataclass(frozen=True)
class FrozenModel:
    """A model that is ready to score, once its layout is settled."""

    scorer: PairScorer
    device: torch.device
    engine: Any = None  # DeepSpeed's around the scorer, None when it is whole on every rank

    @property
    def model(self) -> nn.Module:
        """What is called: the engine, if any, which gathers what the scorer needs."""
        return self.scorer if self.engine is None else self.engine

    def settle(self, config: RunConfig) -> Layout:
        """As `settle_layout`; all ranks call together."""
        record = RunDir(config.run.dir).self_check_path
        return settle_layout(self.model, self.scorer, config.model, self.device, record)

    def take_down(self) -> None:
        """Frees its partitions before another model comes, or the process group goes."""
        if self.engine is not None:
            zero.take_down(self.engine)


def place_model(
    config: RunConfig, model_dir: Path, topology: Topology, device: torch.device, who: str
) -> Placement:
    """Where the ranks put the model in `model_dir`, as rank 0 decides; `who` says so in the log."""
    whole, reason = collectives.broadcast(_fits_whole(config, model_dir, topology, device))
    if topology.rank == 0:
        _logger.info("%s: %s (%s)", who, "whole on every rank" if whole else "ZeRO-3", reason)
    zero3, settings = None, config.train
    if not whole:
        zero3 = ds_config.inference_config(config.model.dtype, topology.world_size)
    # an export may be verified on any number of ranks
    shared = 1 if topology.world_size % settings.sequence_parallel else settings.sequence_parallel
    return Placement(device, zero3, settings.tiled_mlp, shared)


def open_frozen(policy: nn.Module, placement: Placement) -> FrozenModel:
    """Readies a policy that was loaded for the placement; all ranks call together."""
    tile_mlps(policy, placement.tiled_mlp, partitioned=placement.zero3 is not None)
    team = join_team(placement.sequence_parallel)
    scorer = PairScorer(policy.requires_grad_(False).eval(), team=team)
    engine = None if placement.zero3 is None else zero.start_inference(scorer, placement.zero3)
    return FrozenModel(scorer, placement.device, engine)


def _fits_whole(
    config: RunConfig, model_dir: Path, topology: Topology, device: torch.device
) -> tuple[bool, str]:
    """Whether every rank can hold all weights, and why."""
    if config.reference.sharding != "auto":
        return config.reference.sharding == "whole", "reference.sharding"
    weights_gib = _weights_gib(config, model_dir)
    if device.type == "cuda":
        memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    else:
        memory_gib = psutil.virtual_memory().available / topology.local_world_size / 2**30
    limit_gib = WHOLE_MODEL_SHARE * memory_gib
    return weights_gib <= limit_gib, (
        f"weights {weights_gib:.1f} GiB, {WHOLE_MODEL_SHARE:.0%} of a rank's "
        f"{memory_gib:.1f} GiB is {limit_gib:.1f} GiB"
    )


def _weights_gib(config: RunConfig, model_dir: Path) -> float:
    """Weights of a model as they lie in memory."""
    if config.model.quantization is not None:
        setup = replace(
            make_setup(config, 1),
            shape=count_shape(config, None, str(model_dir)),
            sharding=sharding_named("zero0"),
        )
        return total(parameter_sizes(setup)) / GIB
    stored = sum(path.stat().st_size for path in weight_files(model_dir, True))
    return stored / GIB * (2 if config.model.dtype == "float32" else 1)
