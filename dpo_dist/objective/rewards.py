"""The reward metrics TRL logs, per pair and as sums that ranks can add up.

Shapes: B pairs in a micro-batch, M metrics.

A rank adds up the `metric_sums` of its micro-batches, one all-reduce per optimizer step adds up
the ranks, and `metric_means` divides by the number of pairs: the same number for any packing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dpo_dist.objective.losses import log_odds, orpo_nll
from dpo_dist.objective.mixture import router_aux_loss
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps

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
ORPO_NAMES = ("nll_loss", "log_odds_ratio", "log_odds_chosen")


def metric_names(objective: Objective) -> tuple[str, ...]:
    """METRIC_NAMES, and those that only this objective has."""
    of_orpo = ORPO_NAMES if "orpo" in objective.names else ()
    return METRIC_NAMES + of_orpo + (("aux_loss",) if objective.router_aux_loss_coef else ())


def reward_metrics(logps: PairLogps, objective: Objective) -> dict[str, torch.Tensor]:
    """TRL's reward metrics of each pair: name -> (B,) float32, without gradient.

    The reward of a completion is beta * log(policy / reference), the implicit reward of
    Rafailov et al. 2023 (arXiv:2305.18290), below equation 7, whatever the loss or f-divergence.
    Without a reference it is beta * log policy per token, and log-probs are per token too. A tie
    counts as inaccurate.
    """
    chosen_logps, rejected_logps = logps.policy_chosen_logps, logps.policy_rejected_logps
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    if objective.reference_free:
        chosen_logps, rejected_logps = chosen, rejected = logps.mean_logps.unbind(1)
    chosen_rewards = objective.beta * chosen.detach()
    rejected_rewards = objective.beta * rejected.detach()
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen_logps.detach(),
        "logps/rejected": rejected_logps.detach(),
    }


def metric_sums(logps: PairLogps, losses: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Sums the (B,) losses and every metric over the pairs: (M,) float64 as `metric_names`.

    Sums of float32 metrics in float64 do not depend, at float32 precision, on who adds what. The
    routers' balance is one number of all B pairs, so its sum is right for those of a whole step.
    """
    per_pair = {
        COUNT: torch.ones_like(losses),
        "loss": losses.detach(),
        **reward_metrics(logps, objective),
    }
    if "orpo" in objective.names:
        odds = log_odds(logps).detach()
        per_pair |= {"nll_loss": orpo_nll(logps).detach(), "log_odds_chosen": odds}
        per_pair["log_odds_ratio"] = F.logsigmoid(odds)
    if objective.router_aux_loss_coef:
        per_pair["aux_loss"] = router_aux_loss(logps).detach().expand_as(losses)
    return torch.stack([per_pair[name] for name in metric_names(objective)]).double().sum(dim=1)


def metric_means(sums: torch.Tensor, names: Sequence[str] = METRIC_NAMES) -> dict[str, float]:
    """Turns (M,) sums into name -> mean over pairs; `num_pairs` itself is left out."""
    count, *totals = map(float, sums.cpu())
    assert count > 0, f"metrics of {count} pairs have no mean, expected at least one pair"
    return {name: total / count for name, total in zip(names[1:], totals, strict=True)}
