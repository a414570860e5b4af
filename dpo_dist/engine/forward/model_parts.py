"""The parts of a causal LM that the forward uses, also when peft has wrapped them.

Shapes: C completion positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpo_dist.errors import ConfigError
from dpo_dist.objective.logprobs import completion_terms

# how families call the number of experts of a layer
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def base_of(policy: nn.Module) -> Any:
    """The transformers model itself."""
    get_base_model: Any = getattr(policy, "get_base_model", None)
    return policy if get_base_model is None else get_base_model()


def backbone_of(policy: nn.Module) -> Any:
    """The model without its output head: token ids in, last hidden states out."""
    base = base_of(policy)
    decoder = base.get_decoder()
    return base.model if decoder is base else decoder  # llama4 names its prefix wrongly


def output_module(policy: nn.Module) -> Any:
    """The linear layer that makes the logits: the trained copy where peft keeps one.

    Raises ConfigError when an adapter sits on it, since its weight alone is then not the head.
    """
    head = base_of(policy).get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{type(base_of(policy)).__name__} has no output embedding",
            "a causal language model",
            "Check model.path.",
        )
    if not hasattr(policy, "get_base_model"):
        return head
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters:
            return head.original_module
        return head.modules_to_save[head.active_adapters[0]]
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ConfigError(
            f"the adapter targets the output head ({type(head).__name__})",
            "adapters on other layers only, because log-probs are computed from the head's weight",
            "Remove it from adapter.target_modules; to train it whole, name it in "
            "adapter.modules_to_save.",
        )
    return head


def text_parameters(model: Any) -> set[str]:
    """Names of what a text passes through: of a vision-language model, its language model.

    What is left gets no gradient, and weight decay would wear it down.
    """
    parts = (backbone_of(model), output_module(model))
    reached = {id(p) for part in parts for p in part.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in reached}


def train_text(model: nn.Module) -> None:
    """Leaves `text_parameters` to training and freezes the others."""
    text = text_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in text)


def num_experts(policy: nn.Module) -> int:
    """Experts of a layer; raises ConfigError for a model that has no routers to balance."""
    config = base_of(policy).config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        raise ConfigError(
            f"objective.router_aux_loss_coef is set and {type(base_of(policy)).__name__} gives no "
            "router logits",
            "a mixture of experts whose routers are known to transformers",
            "Set objective.router_aux_loss_coef to 0.",
        )
    return next(getattr(config, name) for name in EXPERT_COUNTS if getattr(config, name, None))


def logit_terms(config: Any) -> tuple[float, float | None]:
    """(factor on the logits, soft cap) as the model's family applies them after the head."""
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0  # granite divides by it
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return scale, next((cap for cap in caps if cap), None)


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
