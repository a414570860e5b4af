"""The preference losses: pure functions from named log-prob vectors to one loss per pair.

Shapes: B pairs. Log-probs are sums over the completion tokens of a pair.

Every function has the same parameters, so `LOSSES[name](logps, objective)` is the whole interface;
each reads the settings that it has a use for. The mean over the pairs of an optimizer step is the
loss of the step. `aot` and `aot_unpaired` sort the pairs, so they must be given those of the whole
step at once; every other loss may be given any part of them.

`mixture.py` mixes them, and docs/objectives.md has a table of the formulas.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps

Loss = Callable[[PairLogps, Objective], Tensor]
LARGEST_EXPONENT = 80.0  # of an alpha divergence; exp(80) is finite in float32


def sigmoid(logps: PairLogps, objective: Objective) -> Tensor:
    """DPO, and with smoothing conservative DPO: the (B,) losses -log sigmoid(beta * delta).

    delta is the difference of the scores. Rafailov et al. 2023 (arXiv:2305.18290), equation 7;
    smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    return _smoothed_log_loss(objective.beta * _delta(logps, objective), objective.label_smoothing)


def sigmoid_norm(logps: PairLogps, objective: Objective) -> Tensor:
    """Length-normalized DPO: as `sigmoid`, with scores per completion token; (B,).

    Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), which trains with beta 5.
    """
    delta = _per_token_delta(logps, objective)
    return _smoothed_log_loss(objective.beta * delta, objective.label_smoothing)


def hinge(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses max(0, 1 - beta * delta): a reward margin of one is enough.

    The rank loss of Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425) on log-ratios to the
    reference, as in Liu et al. 2023 (RSO, arXiv:2309.06657), whose margin is 1 / beta.
    """
    return torch.relu(1 - objective.beta * _delta(logps, objective))


def ipo(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses (delta - 1 / (2 * beta))^2 on scores per completion token.

    Azar et al. 2023 (arXiv:2310.12036), equation 17, whose tau is beta. The mean over tokens is
    what TRL computes: with sums the squared target would scale with the completion length.
    """
    return (_per_token_delta(logps, objective) - 1 / (2 * objective.beta)) ** 2


def exo_pair(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) divergences KL(q || p) of q = sigmoid(beta * delta) from p = 1 - label_smoothing.

    Ji et al. 2024 (EXO, arXiv:2402.00856), equation 16 for two answers; smoothing 0 has no value.
    """
    smoothing = objective.label_smoothing
    assert smoothing > 0, "exo_pair takes the logarithm of label_smoothing, found 0.0"
    logits = objective.beta * _delta(logps, objective)
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


def nca_pair(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses -log s(c) - log s(-c) / 2 - log s(-r) / 2 of the rewards c and r.

    Chen et al. 2024 (NCA, arXiv:2402.05369), its pairwise form; keeps the chosen likelihood up.
    """
    chosen, rejected = _rewards(logps, objective)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses of `sigmoid` without the bias that labels flipped at random would cause.

    Chowdhury et al. 2024 (robust DPO, arXiv:2403.00409), whose epsilon is label_smoothing;
    it must be below 1/2.
    """
    logits = objective.beta * _delta(logps, objective)
    flipped = objective.label_smoothing
    unbiased = -(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)
    return unbiased / (1 - 2 * flipped)


def bco_pair(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses -log sigmoid(chosen reward) - log sigmoid(-rejected reward).

    Jung et al. 2024 (BCO, arXiv:2404.04656) on pairs; as in TRL without its reward shift.
    """
    chosen, rejected = _rewards(logps, objective)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) squared distances of the log-ratios from 1 / (2 beta) and -1 / (2 beta).

    Wu et al. 2024 (SPPO, arXiv:2405.00675), equation 4.7 with win probabilities of 1 and 0.
    """
    target = 0.5 / objective.beta
    return (logps.chosen_logratios - target) ** 2 + (logps.rejected_logratios + target) ** 2


def aot(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses of `sigmoid` between sorted log-odds of the policy and of the reference.

    Melnyk et al. 2024 (AOT, arXiv:2406.05882), paired: the distribution of the policy's log-odds
    is to dominate that of the reference's. Row i is of the i-th smallest, not of pair i.
    """
    policy = (logps.policy_chosen_logps - logps.policy_rejected_logps).sort().values
    reference = (logps.reference_chosen_logps - logps.reference_rejected_logps).sort().values
    return _smoothed_log_loss(objective.beta * (policy - reference), objective.label_smoothing)


def aot_unpaired(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses of `sigmoid` between sorted log-ratios of chosen and of rejected answers.

    Melnyk et al. 2024 (AOT, arXiv:2406.05882), unpaired. Row i is of the i-th smallest.
    """
    delta = logps.chosen_logratios.sort().values - logps.rejected_logratios.sort().values
    return _smoothed_log_loss(objective.beta * delta, objective.label_smoothing)


def apo_zero(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses 1 - sigmoid(chosen reward) + sigmoid(rejected reward).

    D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), equation 7: for chosen answers that are
    better than the model's own.
    """
    chosen, rejected = _rewards(logps, objective)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) losses sigmoid(chosen reward) + 1 - sigmoid(reward margin).

    D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), equation 8: for chosen answers that are
    worse than the model's own, whose likelihood goes down too.
    """
    chosen, rejected = _rewards(logps, objective)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) blends of a logistic and an exponential loss by how large the margin is.

    Lu et al. 2024 (DiscoPOP, arXiv:2406.08414), equation 5, whose tau is discopop_tau.
    """
    logits = objective.beta * _delta(logps, objective)
    exponential = torch.sigmoid(logits / objective.discopop_tau)
    return (1 - exponential) * -F.logsigmoid(logits) + exponential * torch.exp(-logits)


def sft(logps: PairLogps, objective: Objective) -> Tensor:
    """The (B,) shares of the negative log-likelihood per chosen token of the step.

    Their mean over the step is the mean over its chosen tokens: long answers weigh more, as in
    plain supervised fine-tuning. Mixed in by RPO (arXiv:2404.19733) and MPO (arXiv:2411.10442).
    """
    per_pair = logps.mean_chosen_length or logps.chosen_lengths.double().mean().item()
    return -logps.all_token_logps[:, 0] / per_pair


def simpo(logps: PairLogps, objective: Objective) -> Tensor:
    """Reference-free: the (B,) losses -log sigmoid(beta * delta - gamma) on log-probs per token.

    Meng et al. 2024 (SimPO, arXiv:2405.14734), equation 6, whose gamma is simpo_gamma.
    """
    chosen, rejected = logps.mean_logps.unbind(1)
    logits = objective.beta * (chosen - rejected) - objective.simpo_gamma
    return _smoothed_log_loss(logits, objective.label_smoothing)


def orpo(logps: PairLogps, objective: Objective) -> Tensor:
    """Reference-free: (B,) shares of the likelihood of prompt and chosen, and beta * odds ratio.

    Hong et al. 2024 (ORPO, arXiv:2403.07691), equations 6 and 7, whose lambda is beta. As in TRL
    the likelihood is the mean over the step's tokens of prompt and chosen, but for the first.
    """
    return orpo_nll(logps) - objective.beta * F.logsigmoid(log_odds(logps))


def orpo_nll(logps: PairLogps) -> Tensor:
    """(B,) shares of the negative log-likelihood per token of prompt and chosen."""
    assert logps.prompt_logps is not None and logps.prompt_lengths is not None, "expected prompts"
    tokens = logps.prompt_lengths - 1 + logps.chosen_lengths
    per_pair = logps.mean_sequence_length or tokens.double().mean().item()
    return -(logps.prompt_logps + logps.policy_chosen_logps) / per_pair


def log_odds(logps: PairLogps) -> Tensor:
    """(B,) log of odds(chosen) / odds(rejected), odds = p / (1 - p), p of a token on average."""
    chosen, rejected = logps.mean_logps.unbind(1)
    return chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "simpo": simpo,
    "orpo": orpo,
}


def _scores(logratios: Tensor, objective: Objective) -> Tensor:
    """f'(policy / reference) of a completion, up to a constant; the log-ratio for reverse KL.

    Wang et al. 2023 (f-DPO, arXiv:2309.16240), table 1.
    """
    match objective.f_divergence_type:
        case "forward_kl":
            return 1 - torch.exp(-logratios)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(logratios)
        case "alpha_divergence" if abs(objective.f_alpha_divergence_coef - 1) >= 1e-6:
            power = objective.f_alpha_divergence_coef - 1
            return torch.expm1((power * logratios).clamp(max=LARGEST_EXPONENT)) / power
        case _:
            return logratios


def _delta(logps: PairLogps, objective: Objective) -> Tensor:
    """Score of chosen minus score of rejected."""
    return _scores(logps.chosen_logratios, objective) - _scores(logps.rejected_logratios, objective)


def _per_token_delta(logps: PairLogps, objective: Objective) -> Tensor:
    """As `_delta`, each score divided by the tokens of its completion."""
    chosen_lengths, rejected_lengths = logps.lengths.unbind(1)
    chosen = _scores(logps.chosen_logratios, objective) / chosen_lengths
    return chosen - _scores(logps.rejected_logratios, objective) / rejected_lengths


def _rewards(logps: PairLogps, objective: Objective) -> tuple[Tensor, Tensor]:
    return objective.beta * logps.chosen_logratios, objective.beta * logps.rejected_logratios


def _smoothed_log_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(logits), mixed with the loss of the swapped pair at weight label_smoothing."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact on either side of -ln 2."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
