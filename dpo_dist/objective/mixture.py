"""The loss of a step: losses with their weights, WPO's pair weights, the routers' balance.

Shapes: B pairs, N pairs of a whole step, K columns that a forward makes, E experts of a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_dist.objective.losses import LOSSES
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps


def pair_losses(logps: PairLogps, objective: Objective) -> Tensor:
    """(B,) losses whose mean over the pairs of an optimizer step is the loss of the step.

    Losses that couple pairs (`aot`, `aot_unpaired`, the routers' balance) need the B pairs to be
    all pairs of the step. KeyError names a loss that there is not.
    """
    weighted = [weight * LOSSES[name](logps, objective) for name, weight in objective.losses]
    losses = torch.stack(weighted).sum(0)
    if objective.use_weighting:
        losses = losses * policy_weights(logps)
    if objective.router_aux_loss_coef:
        losses = losses + objective.router_aux_loss_coef * router_aux_loss(logps)
    return losses


def step_gradient(
    columns: Tensor, named: Callable[[Tensor], PairLogps], objective: Objective
) -> tuple[PairLogps, Tensor, Tensor]:
    """(named log-probs, (N,) losses, (N, K) gradient of their mean by the columns) of a whole step.

    `columns` (N, K) are those of all its pairs and `named` names them. By the chain rule the
    parameters' gradient is that of `(columns * gradient).sum()`, which can be had in parts.
    """
    columns = columns.detach().requires_grad_()
    logps = named(columns)
    losses = pair_losses(logps, objective)
    (gradient,) = torch.autograd.grad(losses.mean(), columns)
    return logps, losses, gradient


def policy_weights(logps: PairLogps) -> Tensor:
    """WPO's (B,) weights, without gradient: how likely the policy itself is to answer so.

    Zhou et al. 2024 (WPO, arXiv:2406.11827), equation 2 with its sampled alignment: of either
    completion exp(mean over tokens of log p(token) - log sum_v p(v)^2), and their product.
    """
    assert logps.sum_sq_logps is not None, "expected sums of log sum_v p(v)^2"
    aligned = (logps.all_token_logps - logps.sum_sq_logps).detach() / logps.lengths
    return aligned.sum(1).exp()


def router_aux_loss(logps: PairLogps) -> Tensor:
    """Load balance of a mixture of experts: E * sum over experts of (share of the choices a token
    makes) * (mean probability); (), over all layers and the tokens of all B pairs.

    Fedus et al. 2021 (Switch Transformer, arXiv:2101.03961), equations 4 to 6. The tokens are those
    of prompt + chosen and prompt + rejected, so a prompt counts twice, as in a padded batch.
    """
    assert logps.expert_counts is not None and logps.expert_probs is not None, "expected routers"
    probs = logps.expert_probs.sum(0)  # of every token and layer they add up to one
    num_rows = probs.detach().sum()
    choices = logps.expert_counts.sum(0).detach() / num_rows
    return len(probs) * (choices * probs / num_rows).sum()
