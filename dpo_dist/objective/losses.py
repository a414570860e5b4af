"""The preference losses: pure functions from named log-prob vectors to one loss per pair.

Shapes: B pairs in a micro-batch. Log-probs are sums over the completion tokens of a pair.

Every function has the same parameters, so `LOSSES[name](logps, beta, label_smoothing)` is the
whole interface. A loss that has no use for `label_smoothing` asserts that it is 0 instead of
dropping it; LOSSES_WITH_LABEL_SMOOTHING names the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PairLogps:
    """What a loss may know about B pairs: six vectors (B,), log-probs float32, lengths integer."""

    policy_chosen_logps: torch.Tensor
    policy_rejected_logps: torch.Tensor
    reference_chosen_logps: torch.Tensor
    reference_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor  # completion tokens scored
    rejected_lengths: torch.Tensor

    @classmethod
    def from_columns(
        cls, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
    ) -> Self:
        """Names the columns of three (B, 2) tensors whose columns are chosen, rejected."""
        for name, tensor in (("reference", reference), ("lengths", lengths)):
            assert tensor.shape == policy.shape, (
                f"{name} has shape {tuple(tensor.shape)}, policy {tuple(policy.shape)}"
            )
        return cls(*policy.unbind(1), *reference.unbind(1), *lengths.unbind(1))

    @property
    def chosen_logratios(self) -> torch.Tensor:  # (B,)
        """log(policy / reference) of the chosen completion."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:  # (B,)
        """log(policy / reference) of the rejected completion."""
        return self.policy_rejected_logps - self.reference_rejected_logps


Loss = Callable[[PairLogps, float, float], torch.Tensor]


def sigmoid(logps: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO, and with smoothing conservative DPO: the (B,) losses -log sigmoid(beta * delta).

    delta is the difference of the summed log-ratios. Rafailov et al. 2023 (arXiv:2305.18290),
    equation 7; smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    delta = logps.chosen_logratios - logps.rejected_logratios
    return _smoothed_log_loss(beta * delta, label_smoothing)


def sigmoid_norm(logps: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """Length-normalised DPO: as `sigmoid`, with log-ratios per completion token; (B,).

    Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), which trains with beta 5.
    """
    return _smoothed_log_loss(beta * _per_token_delta(logps), label_smoothing)


def hinge(logps: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """The (B,) losses max(0, 1 - beta * delta): a reward margin of one is enough.

    The rank loss of Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425) on log-ratios to the
    reference, as in Liu et al. 2023 (RSO, arXiv:2309.06657), whose margin is 1 / beta.
    """
    _assert_no_smoothing("hinge", label_smoothing)
    delta = logps.chosen_logratios - logps.rejected_logratios
    return torch.relu(1 - beta * delta)


def ipo(logps: PairLogps, beta: float, label_smoothing: float) -> torch.Tensor:
    """The (B,) losses (delta - 1 / (2 * beta))^2 on log-ratios per completion token.

    Azar et al. 2023 (arXiv:2310.12036), equation 17, whose tau is beta. The mean over tokens is
    what TRL computes: with sums the squared target would scale with the completion length.
    """
    _assert_no_smoothing("ipo", label_smoothing)
    return (_per_token_delta(logps) - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
}
LOSSES_WITH_LABEL_SMOOTHING = ("sigmoid", "sigmoid_norm")


def _smoothed_log_loss(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log sigmoid(logits), mixed with the loss of the swapped pair at weight label_smoothing."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def _per_token_delta(logps: PairLogps) -> torch.Tensor:
    """Difference of the mean log-ratio per token; an empty completion counts as one token."""
    return logps.chosen_logratios / logps.chosen_lengths.clamp(min=1) - (
        logps.rejected_logratios / logps.rejected_lengths.clamp(min=1)
    )


def _assert_no_smoothing(loss: str, label_smoothing: float) -> None:
    assert label_smoothing == 0.0, f"label_smoothing is {label_smoothing}, loss {loss} wants 0.0"
