"""What a forward tells the losses about pairs: columns of sums, and the names of those columns.

Shapes: B pairs, K columns, E experts of a layer.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Which sums over a pair's tokens a forward makes; by default those of its two completions.

    What is off costs nothing.
    """

    ld_alpha: float = 1.0  # weight of the tokens past the length of the pair's shorter completion
    unweighted: bool = False  # also the completions' sums without ld_alpha
    prompt: bool = False  # also the log-probs of the prompt, all its tokens but the first
    sum_sq: bool = False  # also the sums of log sum_v p(v)^2 over a completion's positions
    num_experts: int = 0  # also how often each of E experts was chosen, and its probabilities

    @property
    def widths(self) -> dict[str, int]:
        """Columns in their order: name -> how many."""
        return {
            "logps": 2,
            "unweighted": 2 * self.unweighted,
            "prompt": int(self.prompt),
            "sum_sq": 2 * self.sum_sq,
            "expert_counts": self.num_experts,
            "expert_probs": self.num_experts,
        }

    def split(self, columns: Tensor) -> dict[str, Tensor]:
        """(B, K) columns by name; those that were not asked for are missing."""
        parts: dict[str, Tensor] = {}
        start = 0
        for name, width in self.widths.items():
            if width:
                parts[name] = columns[:, start : start + width]
            start += width
        return parts

    @property
    def num_columns(self) -> int:
        """K."""
        return sum(self.widths.values())


COMPLETIONS = Terms()  # what the reference pass, the probe and verification score


@dataclass(frozen=True)
class PairLogps:
    """What a loss may know about B pairs: six vectors (B,), log-probs float32, lengths integer.

    The fields after them are None where no loss asked for them.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor  # zeros for an objective without a reference
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor  # completion tokens scored
    rejected_lengths: Tensor
    prompt_lengths: Tensor | None = None
    unweighted_logps: Tensor | None = None  # (B, 2) without ld_alpha
    prompt_logps: Tensor | None = None  # (B,)
    sum_sq_logps: Tensor | None = None  # (B, 2) sums of log sum_v p(v)^2
    expert_counts: Tensor | None = None  # (B, E) times that a token's router chose the expert
    expert_probs: Tensor | None = None  # (B, E) sums of router probabilities
    # means over the pairs of the whole optimizer step, where these B are only some of them
    mean_chosen_length: float | None = None
    mean_sequence_length: float | None = None  # of prompt and chosen, without the first token

    @classmethod
    def from_columns(
        cls,
        policy: Tensor,
        reference: Tensor,
        lengths: Tensor,
        terms: Terms = COMPLETIONS,
        *,
        prompt_lengths: Tensor | None = None,
        mean_chosen_length: float | None = None,
        mean_sequence_length: float | None = None,
    ) -> Self:
        """Names the columns of policy (B, K), and of reference and lengths, both (B, 2).

        The columns of `policy` are those of `terms`, of the others chosen, rejected.
        """
        expected = {"policy": (policy, terms.num_columns), "reference": (reference, 2)}
        for name, (tensor, width) in (expected | {"lengths": (lengths, 2)}).items():
            assert tensor.shape == (len(policy), width), (
                f"{name} has shape {tuple(tensor.shape)}, expected {(len(policy), width)}"
            )
        parts = terms.split(policy)
        return cls(
            *parts["logps"].unbind(1),
            *reference.unbind(1),
            *lengths.unbind(1),
            prompt_lengths=prompt_lengths,
            unweighted_logps=parts.get("unweighted"),
            prompt_logps=parts["prompt"].squeeze(1) if terms.prompt else None,
            sum_sq_logps=parts.get("sum_sq"),
            expert_counts=parts.get("expert_counts"),
            expert_probs=parts.get("expert_probs"),
            mean_chosen_length=mean_chosen_length,
            mean_sequence_length=mean_sequence_length,
        )

    @property
    def chosen_logratios(self) -> Tensor:  # (B,)
        """log(policy / reference) of the chosen completion."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:  # (B,)
        """log(policy / reference) of the rejected completion."""
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def lengths(self) -> Tensor:  # (B, 2)
        """Completion tokens, chosen and rejected; an empty completion counts as one token."""
        return torch.stack([self.chosen_lengths, self.rejected_lengths], dim=1).clamp(min=1)

    @property
    def mean_logps(self) -> Tensor:  # (B, 2)
        """The policy's log-probs per completion token, chosen and rejected."""
        logps = torch.stack([self.policy_chosen_logps, self.policy_rejected_logps], dim=1)
        return logps / self.lengths

    @property
    def all_token_logps(self) -> Tensor:  # (B, 2)
        """The completions' sums with every token at weight one, whatever ld_alpha is."""
        if self.unweighted_logps is not None:
            return self.unweighted_logps
        return torch.stack([self.policy_chosen_logps, self.policy_rejected_logps], dim=1)
