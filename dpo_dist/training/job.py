"""What a training run is made of, on one rank."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import MicroBatch, plan_micro_batches, step_pair_indices
from dpo_dist.engine.forward.packing import PackedPairs, pack_ahead
from dpo_dist.engine.forward.pair_scorer import scorer_of
from dpo_dist.inputs.scored_pairs import ScoredPairs, shared_for
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import Terms
from dpo_dist.objective.rewards import metric_names
from dpo_dist.planning.setup import ModelShape
from dpo_dist.reference.arrays import IntArray
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import Topology


@dataclass(frozen=True)
class Job:
    """Everything that stays the same from the first step to the last."""

    models: RunModels
    topology: Topology
    device: torch.device
    engine: Any
    train: ScoredPairs
    held_out: ScoredPairs
    num_steps: int
    objective: Objective
    terms: Terms  # what its losses need of a forward
    shape: ModelShape | None = None  # for MFU, where the GPU's peak is known

    @property
    def config(self) -> RunConfig:
        return self.models.config

    @property
    def paths(self) -> RunDir:
        return RunDir(self.config.run.dir)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and tells."""
        return self.topology.rank == 0

    @property
    def place(self) -> Topology:
        """This rank's place among those that read batches, where several ranks share one."""
        return self.topology.in_teams_of(self.config.train.sequence_parallel)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The M metrics of the objective."""
        return metric_names(self.objective)

    def step_pairs(self, step: int) -> IntArray:
        """The pairs of optimizer step 1, 2, ... over all ranks."""
        pairs, config = self.train.pairs, self.config
        return step_pair_indices(
            step - 1, len(pairs), config.train.global_batch_size, config.run.seed,
            pairs.together(config.data.order),
        )  # fmt: skip

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step 1, 2, ..."""
        planned = plan_micro_batches(
            self.train.pairs.packed_lengths,
            self.step_pairs(step),
            self.place.world_size,
            self.config.train.micro_batch_tokens,
            shared_for(self.engine, self.train.pairs),
        )
        return planned[self.place.rank]

    def packed(self, batches: list[MicroBatch]) -> AbstractContextManager[Iterator[PackedPairs]]:
        """The rows of micro-batches, each packed while the one before it computes."""
        shared = scorer_of(self.engine).shares_prompts
        ids = self.train.pairs.token_ids
        return pack_ahead(batches, ids, self.device, self.terms, shared=shared)
