"""Keys of `objective` that do not go together are refused with the reason; the others are not."""

from typing import Any

import pytest

from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError
from dpo_dist.inputs.scored_pairs import objective_of

BASE: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss": "ippo"}, "objective.loss: unknown loss 'ippo'; did you mean ipo?"),
    ({"loss": ["sft", 3]}, "objective.loss: unknown loss 3; valid: sigmoid, sigmoid_norm, "),
    (
        {"loss": []},
        "objective.loss: an empty list; expected at least one loss. Name one, for example sigmoid.",
    ),
    (
        {"loss": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "objective.loss_weights: 1 for 2 of objective.loss (sigmoid, sft); expected one weight per "
        "loss. Give every loss a weight, or remove the key.",
    ),
    (
        {"loss": "ipo", "label_smoothing": 0.1},
        "objective.label_smoothing: 0.1 with loss ipo; expected 0.0, or a loss that reads it "
        "(sigmoid, sigmoid_norm, exo_pair, robust, aot, aot_unpaired, simpo). Remove the key, or "
        "change objective.loss.",
    ),
    (
        {"loss": "exo_pair"},
        "objective.label_smoothing: 0.0 with loss exo_pair; expected a number above 0, because "
        "exo_pair takes its logarithm. Set it to 0.001, as the paper does.",
    ),
    (
        {"discopop_tau": 0.1},
        "objective.discopop_tau: 0.1 with loss sigmoid; expected 0.05, or a loss that reads it "
        "(discopop). Remove the key, or change objective.loss.",
    ),
    (
        {"simpo_gamma": 1.5},
        "objective.simpo_gamma: 1.5 with loss sigmoid; expected 0.5, or a loss that reads it "
        "(simpo). Remove the key, or change objective.loss.",
    ),
    (
        {"f_alpha_divergence_coef": 2.0},
        "objective.f_alpha_divergence_coef: 2.0 with f_divergence_type reverse_kl; expected 0.5, "
        "because only alpha_divergence reads it. Remove the key, or set "
        "objective.f_divergence_type to alpha_divergence.",
    ),
    (
        {"loss": ["sigmoid", "aot"], "f_divergence_type": "js_divergence"},
        "objective.f_divergence_type: js_divergence with loss aot; expected reverse_kl, or only "
        "losses of a score difference (sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, "
        "discopop, sft). Remove the key, or change objective.loss.",
    ),
    (
        {"loss": "aot", "use_weighting": True},
        "objective.use_weighting: true with loss aot; expected false, or only losses of a pair and "
        "its reference (sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, "
        "sppo_hard, apo_zero, apo_down, discopop). Remove the key, or change objective.loss.",
    ),
    (
        {"loss": ["simpo", "hinge"]},
        "objective.loss: simpo beside hinge; expected only losses with a reference or only losses "
        "without one, because their rewards are not comparable. Remove one or the other.",
    ),
    (
        {"loss": "orpo", "ld_alpha": 0.5},
        "objective.ld_alpha: 0.5 with loss orpo; expected 1.0, because orpo averages over all "
        "tokens of an answer. Remove the key.",
    ),
    ({"loss": "orpo", "use_weighting": True}, "objective.use_weighting: true with loss orpo; "),
    ({"loss": "sft", "use_weighting": True}, "objective.use_weighting: true with loss sft; "),
]


@pytest.mark.parametrize(("objective", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_wrong_combinations_are_refused_with_the_reason(
    objective: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE | {"objective": objective})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss": ["aot", "sft"], "label_smoothing": 0.1, "ld_alpha": 0.5},
        {"loss": ["simpo", "sft"], "simpo_gamma": 1.0, "label_smoothing": 0.1},
        {"loss": "robust", "use_weighting": True, "label_smoothing": 0.1},
        {"loss": ["hinge", "sft"], "f_divergence_type": "forward_kl"},
    ],
    ids=str,
)
def test_right_combinations(objective: dict[str, Any]) -> None:
    section = parse_config(BASE | {"objective": objective}).objective
    assert section.names == tuple(
        [objective["loss"]] if isinstance(objective["loss"], str) else objective["loss"]
    )


def test_the_objective_as_the_losses_read_it() -> None:
    config = parse_config(BASE | {"objective": {"loss": ["simpo", "sft"], "simpo_gamma": 1.0}})
    objective = objective_of(config)
    assert objective.losses == (("simpo", 1.0), ("sft", 1.0))
    assert objective.reference_free and objective.simpo_gamma == 1.0
    assert not objective_of(parse_config(BASE)).reference_free


def test_what_needs_a_forward_ahead() -> None:
    reasons = {
        "aot": "aot sorts the pairs of a step",
        "aot_unpaired": "aot_unpaired sorts the pairs of a step",
        "sft": None,
        "sigmoid": None,
    }
    for loss, reason in reasons.items():
        config = parse_config(BASE | {"objective": {"loss": loss}})
        assert config.objective.second_forward == reason
    config = parse_config(
        BASE
        | {
            "objective": {"router_aux_loss_coef": 0.1},
            "train": {"gradient_checkpointing": False},
        }
    )
    assert config.objective.second_forward == "routers are balanced over a step"
