"""The reward metrics TRL logs, per pair and as sums that ranks can add up.

Shapes: B pairs in a micro-batch, M = len(METRIC_NAMES).

A rank adds up the `metric_sums` of its micro-batches, one all-reduce per optimizer step adds up
the ranks, and `metric_means` divides by the number of pairs: the same number for any packing.
"""

import torch

from dpo_dist.objective.losses import PairLogps

COUNT = "num_pairs"
METRIC_NAMES = (
    COUNT,
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def reward_metrics(logps: PairLogps, beta: float) -> dict[str, torch.Tensor]:
    """TRL's reward metrics of each pair: name -> (B,) float32, without gradient.

    The reward of a completion is beta * log(policy / reference), the implicit reward of
    Rafailov et al. 2023 (arXiv:2305.18290), below equation 7. A tie counts as inaccurate.
    """
    chosen_rewards = beta * logps.chosen_logratios.detach()
    rejected_rewards = beta * logps.rejected_logratios.detach()
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": logps.policy_chosen_logps.detach(),
        "logps/rejected": logps.policy_rejected_logps.detach(),
    }


def metric_sums(logps: PairLogps, losses: torch.Tensor, beta: float) -> torch.Tensor:
    """Sums the (B,) losses and every metric over the pairs: (M,) float64 as METRIC_NAMES.

    Sums of float32 metrics in float64 do not depend, at float32 precision, on who adds what.
    """
    per_pair = {
        COUNT: torch.ones_like(losses),
        "loss": losses.detach(),
        **reward_metrics(logps, beta),
    }
    return torch.stack([per_pair[name] for name in METRIC_NAMES]).double().sum(dim=1)


def metric_means(sums: torch.Tensor) -> dict[str, float]:
    """Turns (M,) sums into name -> mean over pairs; `num_pairs` itself is left out."""
    count, *totals = map(float, sums.cpu())
    assert count > 0, f"metrics of {count} pairs have no mean, wanted at least one pair"
    return {name: total / count for name, total in zip(METRIC_NAMES[1:], totals, strict=True)}
