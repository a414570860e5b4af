"""The section of a run config about the loss, and the rules between its keys."""

import difflib
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

from pydantic import Field, field_validator

from dpo_dist.config.section import Rule, Section

LossName = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "orpo",
]  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo")
COUPLED = ("aot", "aot_unpaired")  # they sort the pairs of a step
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired", "simpo")
# losses of the score difference, which an f-divergence other than reverse KL redefines
WITH_F_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip
# losses of a single pair and its reference, which is what WPO weights
WITH_WEIGHTING = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


class ObjectiveSection(Section):
    loss: LossName | list[LossName] = Field(
        "sigmoid", description="One loss, or a list to sum; docs/objectives.md describes them all."
    )
    loss_weights: list[float] | None = Field(
        None, description="Weights of a list of losses; default to 1 each."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull toward the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (cDPO)."
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        Field(
            "reverse_kl", description="Divergence that keeps the policy near the reference (f-DPO)."
        )
    )
    f_alpha_divergence_coef: float = Field(0.5, description="Alpha of alpha_divergence.")
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of the blend in discopop.")
    simpo_gamma: float = Field(0.5, ge=0, description="Reward margin that simpo aims for.")
    ld_alpha: float = Field(
        1.0, ge=0, le=1,
        description="Weight of tokens beyond the length of the shorter answer (LD-DPO).",
    )  # fmt: skip
    use_weighting: bool = Field(
        False, description="Weight pairs by how likely the policy is to produce them (WPO)."
    )
    router_aux_loss_coef: float = Field(
        0.0, ge=0, description="Weight of the load-balancing loss of a mixture of experts."
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """One line for an unknown loss; pydantic would write one for each type of the key."""
        valid = get_args(LossName)
        names = cast(list[Any], value) if isinstance(value, list) else [value]
        for name in names:
            if name not in valid:
                close = difflib.get_close_matches(str(name), valid, n=1)
                hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"
                raise ValueError(f"unknown loss {name!r}; {hint}")
        return cast(Any, value)

    @property
    def names(self) -> tuple[LossName, ...]:
        """The losses, one or more."""
        return (self.loss,) if isinstance(self.loss, str) else tuple(self.loss)

    @property
    def weighted_losses(self) -> tuple[tuple[str, float], ...]:
        """The losses with their weights."""
        return tuple(zip(self.names, self.loss_weights or [1.0] * len(self.names), strict=True))

    @property
    def reference_free(self) -> bool:
        """Whether no reference model is needed."""
        return any(name in REFERENCE_FREE for name in self.names)

    @property
    def second_forward(self) -> str | None:
        """Why the gradient of a pair needs all pairs of its step first; None where it does not."""
        coupled = [name for name in self.names if name in COUPLED]
        if coupled:
            return f"{coupled[0]} sorts the pairs of a step"
        return "routers are balanced over a step" if self.router_aux_loss_coef else None


def objective_rules(objective: ObjectiveSection) -> Iterator[Rule]:
    """What must hold between keys of the section."""
    names, weights = objective.names, objective.loss_weights
    listed = ", ".join(names)
    yield (
        not names,
        "objective.loss: an empty list",
        "at least one loss",
        "Name one, for example sigmoid.",
    )
    yield (
        weights is not None and len(weights) != len(names),
        f"objective.loss_weights: {len(weights or ())} for {len(names)} of objective.loss "
        f"({listed})",
        "one weight per loss",
        "Give every loss a weight, or remove the key.",
    )
    yield (
        "exo_pair" in names and objective.label_smoothing == 0,
        "objective.label_smoothing: 0.0 with loss exo_pair",
        "a number above 0, because exo_pair takes its logarithm",
        "Set it to 0.001, as the paper does.",
    )
    yield from _unused(objective, listed)
    yield from _modifiers(objective)
    if objective.reference_free:
        yield from _reference_free(objective)


def _unused(objective: ObjectiveSection, listed: str) -> Iterator[Rule]:
    """Keys must not be set where nothing would read them."""
    readers = {
        "label_smoothing": SMOOTHED,
        "discopop_tau": ("discopop",),
        "simpo_gamma": ("simpo",),
    }
    for key, losses in readers.items():
        value, default = getattr(objective, key), ObjectiveSection.model_fields[key].default
        yield (
            value != default and bool(objective.names) and not {*objective.names} & {*losses},
            f"objective.{key}: {value} with loss {listed}",
            f"{default}, or a loss that reads it ({', '.join(losses)})",
            "Remove the key, or change objective.loss.",
        )
    alpha, divergence = objective.f_alpha_divergence_coef, objective.f_divergence_type
    yield (
        alpha != 0.5 and divergence != "alpha_divergence",
        f"objective.f_alpha_divergence_coef: {alpha} with f_divergence_type {divergence}",
        "0.5, because only alpha_divergence reads it",
        "Remove the key, or set objective.f_divergence_type to alpha_divergence.",
    )


def _modifiers(objective: ObjectiveSection) -> Iterator[Rule]:
    """Not every loss can be modified."""
    others = [name for name in objective.names if name not in WITH_F_DIVERGENCE]
    yield (
        objective.f_divergence_type != "reverse_kl" and bool(others),
        f"objective.f_divergence_type: {objective.f_divergence_type} with loss {', '.join(others)}",
        f"reverse_kl, or only losses of a score difference ({', '.join(WITH_F_DIVERGENCE)})",
        "Remove the key, or change objective.loss.",
    )
    others = [name for name in objective.names if name not in WITH_WEIGHTING]
    yield (
        objective.use_weighting and bool(others),
        f"objective.use_weighting: true with loss {', '.join(others)}",
        f"false, or only losses of a pair and its reference ({', '.join(WITH_WEIGHTING)})",
        "Remove the key, or change objective.loss.",
    )


def _reference_free(objective: ObjectiveSection) -> Iterator[Rule]:
    free = next(name for name in objective.names if name in REFERENCE_FREE)
    others = [name for name in objective.names if name not in (*REFERENCE_FREE, "sft")]
    yield (
        bool(others),
        f"objective.loss: {free} beside {', '.join(others)}",
        "only losses with a reference or only losses without one, because their rewards are not "
        "comparable",
        "Remove one or the other.",
    )
    yield (
        objective.ld_alpha != 1,
        f"objective.ld_alpha: {objective.ld_alpha} with loss {free}",
        f"1.0, because {free} averages over all tokens of an answer",
        "Remove the key.",
    )
