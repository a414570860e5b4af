"""The section of a run config about the loss, and which of its keys go together."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

from pydantic import Field, field_validator

from dpo_dist.config.section import Section

LossName = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "orpo",
]  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo")
COUPLED = ("aot", "aot_unpaired")  # sort the pairs of a step
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired", "simpo")
# losses of the score difference, which an f-divergence other than reverse KL redefines
WITH_F_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip
# losses of a single pair beside its reference, which is what WPO weights
WITH_WEIGHTING = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


class ObjectiveSection(Section):
    loss: LossName | list[LossName] = Field(
        "sigmoid", description="Loss, or several that are summed; docs/objectives.md has them all."
    )
    loss_weights: list[float] | None = Field(
        None, description="Weights of a list of losses; 1 each by default."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (cDPO)."
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        Field("reverse_kl", description="What keeps the policy near the reference (f-DPO).")
    )
    f_alpha_divergence_coef: float = Field(0.5, description="Alpha of alpha_divergence.")
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of discopop's blend.")
    simpo_gamma: float = Field(0.5, ge=0, description="Reward margin that simpo aims at.")
    ld_alpha: float = Field(
        1.0, ge=0, le=1,
        description="Weight of tokens past the length of a pair's shorter answer (LD-DPO).",
    )  # fmt: skip
    use_weighting: bool = Field(
        False, description="Weight pairs by how likely the policy is to answer so (WPO)."
    )
    router_aux_loss_coef: float = Field(
        0.0, ge=0, description="Weight of the routers' load balance in a mixture of experts."
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """One line for an unknown loss; pydantic's own would be one for each type of the key."""
        valid = get_args(LossName)
        names = cast(list[Any], value) if isinstance(value, list) else [value]
        for name in names:
            if name not in valid:
                close = difflib.get_close_matches(str(name), valid, n=1)
                hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"
                raise ValueError(f"objective.loss: {name!r} is no loss; {hint}")
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


def objective_contradictions(objective: ObjectiveSection) -> Iterator[str]:
    """What is wrong between keys of the section that are right one by one."""
    names = objective.names
    listed = ", ".join(names) or "none"
    if not names:
        yield "objective.loss: an empty list; expected one loss at least. Name one."
    weights = objective.loss_weights
    if weights is not None and len(weights) != len(names):
        yield (
            f"objective.loss_weights: {len(weights)} for {len(names)} of objective.loss "
            f"({listed}); expected as many. Give every loss its weight, or leave the key out."
        )
    yield from _unused(objective, listed)
    if "exo_pair" in names and objective.label_smoothing == 0:
        yield (
            "objective.label_smoothing: 0.0 with loss exo_pair; expected above 0, because exo_pair "
            "takes its logarithm. Its paper uses 0.001."
        )
    if objective.f_divergence_type != "reverse_kl":
        yield from _refused(
            f"objective.f_divergence_type: {objective.f_divergence_type}",
            names, WITH_F_DIVERGENCE, "Other losses are not of a difference of scores.",
        )  # fmt: skip
    if objective.use_weighting:
        yield from _refused(
            "objective.use_weighting: true",
            names, WITH_WEIGHTING, "The others have no loss of a single pair beside its reference.",
        )  # fmt: skip
    if objective.reference_free:
        yield from _reference_free(objective)


def _unused(objective: ObjectiveSection, listed: str) -> Iterator[str]:
    """Keys that are set and that nothing would read."""
    names = objective.names
    readers = {
        "label_smoothing": SMOOTHED,
        "discopop_tau": ("discopop",),
        "simpo_gamma": ("simpo",),
    }
    for key, losses in readers.items():
        value, default = getattr(objective, key), ObjectiveSection.model_fields[key].default
        if value != default and names and not set(names) & set(losses):
            yield (
                f"objective.{key}: {value} with loss {listed}; expected {default}, or "
                f"{_either(losses)}. No other loss reads it."
            )
    alpha = objective.f_alpha_divergence_coef
    if alpha != 0.5 and objective.f_divergence_type != "alpha_divergence":
        yield (
            f"objective.f_alpha_divergence_coef: {alpha} with f_divergence_type "
            f"{objective.f_divergence_type}; expected 0.5, or alpha_divergence. No other reads it."
        )


def _reference_free(objective: ObjectiveSection) -> Iterator[str]:
    free = next(name for name in objective.names if name in REFERENCE_FREE)
    others = [name for name in objective.names if name not in (*REFERENCE_FREE, "sft")]
    if others:
        yield (
            f"objective.loss: {free} beside {', '.join(others)}; expected losses that all have a "
            f"reference, or none. {free} has none: its rewards are other numbers."
        )
    if objective.ld_alpha != 1:
        yield (
            f"objective.ld_alpha: {objective.ld_alpha} with loss {free}; expected 1.0, because "
            f"{free} takes the mean over all tokens of an answer. Leave it out."
        )


def _refused(
    found: str, names: Sequence[str], allowed: Sequence[str], reason: str
) -> Iterator[str]:
    others = [name for name in names if name not in allowed]
    if others:
        yield f"{found} with loss {', '.join(others)}; expected {_either(allowed)}. {reason}"


def _either(losses: Sequence[str]) -> str:
    *first, last = losses
    return f"loss {', '.join(first)} or {last}" if first else f"loss {last}"
