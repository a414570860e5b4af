"""What the ranks add up: one vector an optimizer step, so that metrics cost one collective.

B pairs in a micro-batch, M metrics.
"""

from dataclasses import dataclass

import torch

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import PackedPairs
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps
from dpo_dist.objective.rewards import COUNT, metric_means, metric_names, metric_sums


@dataclass
class StepSums:
    """Sums over the pairs of one step, or of all steps since the last report."""

    objective: Objective
    metrics: torch.Tensor  # (M,) float64, named by `metric_names`
    tokens: float = 0  # packed, as they were computed
    tokens_unshared: float = 0  # what they would be with every prompt computed twice
    tokens_scored: float = 0  # that reached the output head
    ranks_stopping: float = 0  # that were told to stop
    ranks_written: float = 0  # that have written their files of the checkpoint under way

    @classmethod
    def zeros(cls, objective: Objective, device: torch.device | str = "cpu") -> "StepSums":
        num_metrics = len(metric_names(objective))
        return cls(objective, torch.zeros(num_metrics, dtype=torch.float64, device=device))

    @property
    def num_pairs(self) -> float:
        return float(self.metrics[metric_names(self.objective).index(COUNT)])

    @property
    def is_finite(self) -> bool:
        return bool(self.metrics.isfinite().all())

    def one_if_finite(self) -> torch.Tensor:
        """1, or NaN where a sum is not finite: a factor, so that nobody waits for the device."""
        return torch.where(self.metrics.isfinite().all(), 1.0, torch.nan)

    def add_pairs(self, logps: PairLogps, losses: torch.Tensor) -> None:
        """Adds the (B,) losses and every metric of B pairs."""
        self.metrics += metric_sums(logps, losses, self.objective)

    def add_tokens(self, packed: PackedPairs) -> None:
        """Adds the tokens of a micro-batch."""
        self.tokens += packed.num_tokens
        self.tokens_unshared += packed.num_tokens_unshared
        self.tokens_scored += packed.num_scored

    def over_ranks(self, *, stopping: bool, written: bool, alike: int = 1) -> "StepSums":
        """The sums of all ranks, on the CPU of every rank; the step's one collective.

        `alike` ranks have each added up the same pairs, as those do that share a row.
        """
        tokens = (self.tokens, self.tokens_unshared, self.tokens_scored)
        counts = (*(count / alike for count in tokens), float(stopping), float(written))
        vector = torch.cat([self.metrics / alike, self.metrics.new_tensor(counts)])
        summed = collectives.sum_over_ranks(vector).cpu()
        return StepSums(self.objective, summed[: -len(counts)], *summed[-len(counts) :].tolist())

    def __iadd__(self, other: "StepSums") -> "StepSums":
        self.metrics += other.metrics
        self.tokens += other.tokens
        self.tokens_unshared += other.tokens_unshared
        self.tokens_scored += other.tokens_scored
        return self

    def means(self) -> dict[str, float]:
        """name -> mean over the pairs."""
        return metric_means(self.metrics, metric_names(self.objective))
