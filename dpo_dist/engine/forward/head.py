"""The output head of a causal LM, applied to completion positions only.

Shapes: C completion positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from dpo_dist.engine.forward.model_parts import base_of, logit_terms, output_module
from dpo_dist.objective.logprobs import completion_terms


class CompletionHead(nn.Module):
    """Hidden states of C positions to log-probs of their targets, with the policy's own head.

    It owns no parameter and is a module of its own so that ZeRO-3 gathers the head around it:
    once before its forward, once before its backward.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: as an attribute it would be a submodule twice
        output_module(policy)  # refuse a head that cannot be used before anything is computed
        self.logit_scale, self.softcap = logit_terms(base_of(policy).config)

    def forward(
        self, hidden: Tensor, targets: Tensor, sum_sq: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(C,) log-probs, and with `sum_sq` (C,) log sum_v p(v)^2, as `completion_terms`."""
        head = output_module(self._policy[0])
        return completion_terms(
            hidden.to(head.weight.dtype),
            head.weight,
            targets,
            bias=getattr(head, "bias", None),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            sum_sq=sum_sq,
        )

    def declare_parameters(self) -> None:
        """Tells ZeRO-3 what this module reads; must run before the module is called."""
        head = output_module(self._policy[0])
        for parameter in (head.weight, getattr(head, "bias", None)):
            if hasattr(parameter, "ds_id"):
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)
