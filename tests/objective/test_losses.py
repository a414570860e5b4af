"""The losses against TRL's own trainer, on the batch that its own dataloader makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.oracles.against_trl import (
    assert_same_loss_and_gradient,
    names_of,
    tiny_llama,
    trl_batch,
)
from support.oracles.plain_columns import plain_pair_logps

from dpo_dist.config.objective_section import (
    COUPLED,
    REFERENCE_FREE,
    SMOOTHED,
    WITH_F_DIVERGENCE,
    LossName,
)
from dpo_dist.objective.losses import LOSSES, exo_pair, hinge, ipo, sigmoid, sigmoid_norm
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps, Terms
from dpo_dist.objective.rewards import METRIC_NAMES, metric_means, metric_sums, reward_metrics


def our_logps(model: torch.nn.Module, batch: dict[str, Any], objective: Objective) -> PairLogps:
    """The pairs of TRL's batch, from logits that have nothing to do with our forward."""
    return plain_pair_logps(model, tiny_llama(seed=2), batch, objective.terms())


def swapped(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in batch.items()}


def one(name: str, **settings: Any) -> Objective:
    return Objective(losses=((name, 1.0),), **settings)


F_DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]
OF_TRL = [name for name in LOSSES if name not in REFERENCE_FREE]
NEEDS_SMOOTHING = {"exo_pair": 0.01, "robust": 0.1}
OBJECTIVES = [
    *(
        one(name, beta=beta, label_smoothing=NEEDS_SMOOTHING.get(name, 0.0))
        for name in OF_TRL
        for beta in (0.1, 1.0)
    ),
    *(one(name, beta=0.5, label_smoothing=0.2) for name in ("aot", "aot_unpaired", "robust")),
    one("discopop", discopop_tau=0.5),
    *(
        one(name, label_smoothing=NEEDS_SMOOTHING.get(name, 0.0), **settings)
        for name in WITH_F_DIVERGENCE
        for settings in F_DIVERGENCES
        if name in ("sigmoid", "sigmoid_norm") or settings is F_DIVERGENCES[2]
    ),
    *(one(name, ld_alpha=0.3) for name in ("sigmoid", "ipo", "aot", "nca_pair", "sft")),
    *(one(name, use_weighting=True) for name in ("sigmoid", "bco_pair", "ipo")),
    one("sigmoid", ld_alpha=0.3, use_weighting=True),
    Objective(losses=(("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))),
    Objective(losses=(("aot", 1.0), ("sft", 0.5), ("apo_zero", 2.0)), ld_alpha=0.0),
    Objective(losses=(("robust", 1.0), ("ipo", 0.5)), label_smoothing=0.1, use_weighting=True),
]


def label(objective: Objective) -> str:
    names = "+".join(f"{weight:g}{name}" for name, weight in objective.losses)
    changed = {k: v for k, v in vars(objective).items() if k != "losses" and v != DEFAULTS[k]}
    return "-".join([names, *(f"{key}={value}" for key, value in changed.items())])


DEFAULTS = vars(Objective())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_equals_trl_in_value_gradient_and_metrics(objective: Objective, tmp_path: Path) -> None:
    trainer, batch = trl_batch(tmp_path, 6, **names_of(objective))
    assert isinstance(trainer.model, torch.nn.Module)
    model = tiny_llama(seed=1)
    trl_loss = trainer.compute_loss(trainer.model, batch)

    logps = our_logps(model, batch, objective)
    losses = pair_losses(logps, objective)
    assert losses.shape == (6,)
    assert_same_loss_and_gradient(trl_loss, trainer.model, losses.mean(), model)

    means = metric_means(metric_sums(logps, losses, objective))
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    logged["loss"] = trl_loss.item()
    assert means == pytest.approx({key: logged[key] for key in METRIC_NAMES[1:]}, abs=1e-5)
    for key, values in reward_metrics(logps, objective).items():
        assert values.shape == (6,) and not values.requires_grad
        assert values.mean().item() == pytest.approx(logged[key], abs=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_smoothing_mixes_in_trls_loss_of_the_swapped_pair(name: str, tmp_path: Path) -> None:
    # TRL's own smoothing of these two does nothing
    trainer, batch = trl_batch(tmp_path, 6, loss_type=[name], beta=0.5, label_smoothing=0.2)
    assert isinstance(trainer.model, torch.nn.Module)
    model = tiny_llama(seed=1)
    objective = one(name, beta=0.5, label_smoothing=0.2)
    loss = pair_losses(our_logps(model, batch, objective), objective).mean()
    right = trainer.compute_loss(trainer.model, batch)
    flipped = trainer.compute_loss(trainer.model, swapped(batch))
    assert_same_loss_and_gradient(0.8 * right + 0.2 * flipped, trainer.model, loss, model)


def test_the_names_in_the_config_are_those_of_the_losses() -> None:
    assert set(get_args(LossName)) == set(LOSSES)
    for name in LOSSES:
        smoothing = 0.2
        if name == "exo_pair":
            continue  # has no value without
        smoothed, plain = (
            LOSSES[name](random_logps(), one(name, label_smoothing=e)) for e in (smoothing, 0.0)
        )
        assert bool((smoothed != plain).any()) == (name in SMOOTHED), name


@pytest.mark.parametrize("name", list(LOSSES))
def test_which_losses_couple_pairs_and_which_have_no_reference(name: str) -> None:
    objective = one(name, label_smoothing=0.1 if name in SMOOTHED else 0.0)
    logps = random_logps()
    losses = LOSSES[name](logps, objective)
    parts = [LOSSES[name](take(logps, rows), objective) for rows in (slice(0, 5), slice(5, 9))]
    alone = torch.cat(parts)
    assert bool(torch.allclose(losses, alone)) == (name not in COUPLED)
    other = dataclasses.replace(logps, reference_chosen_logps=torch.zeros(9))
    assert bool((LOSSES[name](other, objective) == losses).all()) == (
        name in (*REFERENCE_FREE, "sft")
    )


def test_exo_needs_smoothing() -> None:
    with pytest.raises(AssertionError, match=r"logarithm of label_smoothing, found 0\.0"):
        exo_pair(example_logps(), one("exo_pair"))


def test_values_by_hand() -> None:
    # log-ratios 2 and -4 over 4 and 2 tokens: delta 6, per token 0.5 + 2
    logps = example_logps()
    log1p = torch.log1p(torch.exp(torch.tensor([-0.6])))
    torch.testing.assert_close(sigmoid(logps, one("sigmoid")), log1p)
    torch.testing.assert_close(
        sigmoid_norm(logps, one("sigmoid_norm", beta=5.0)),
        torch.log1p(torch.exp(torch.tensor([-12.5]))),
    )
    torch.testing.assert_close(hinge(logps, one("hinge")), torch.tensor([0.4]))
    torch.testing.assert_close(hinge(logps, one("hinge", beta=1.0)), torch.tensor([0.0]))
    torch.testing.assert_close(ipo(logps, one("ipo", beta=0.25)), torch.tensor([0.25]))


def test_an_empty_completion_divides_by_one() -> None:
    empty = dataclasses.replace(example_logps(), rejected_lengths=torch.tensor([0]))
    assert torch.isfinite(ipo(empty, one("ipo"))).all()
    assert torch.isfinite(sigmoid_norm(empty, one("sigmoid_norm"))).all()


def test_sft_and_orpo_share_the_tokens_of_a_step() -> None:
    logps = random_logps()
    whole = {name: LOSSES[name](logps, one(name)) for name in ("sft", "orpo")}
    part = dataclasses.replace(
        take(logps, slice(2, 4)),
        mean_chosen_length=logps.chosen_lengths.double().mean().item(),
        mean_sequence_length=(logps.chosen_lengths + 2).double().mean().item(),
    )
    for name, losses in whole.items():
        torch.testing.assert_close(LOSSES[name](part, one(name)), losses[2:4])


def random_logps(num_pairs: int = 9) -> PairLogps:
    """Prompts of 3 tokens; answers of as many tokens, so that parts have the mean of the whole."""
    generator = torch.Generator().manual_seed(0)
    terms = Terms(prompt=True)
    return PairLogps.from_columns(
        -5 * torch.rand(num_pairs, 3, generator=generator) - 0.1,
        -5 * torch.rand(num_pairs, 2, generator=generator),
        torch.full((num_pairs, 2), 4),
        terms,
        prompt_lengths=torch.full((num_pairs,), 3),
    )


def take(logps: PairLogps, rows: slice) -> PairLogps:
    vectors = {k: v[rows] for k, v in vars(logps).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(logps, **vectors)


def test_columns_must_agree_in_shape() -> None:
    with pytest.raises(AssertionError, match=r"reference has shape \(3, 2\), expected \(2, 2\)"):
        PairLogps.from_columns(torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(2, 2))


def example_logps() -> PairLogps:
    return PairLogps.from_columns(
        policy=torch.tensor([[-8.0, -9.0]]),
        reference=torch.tensor([[-10.0, -5.0]]),
        lengths=torch.tensor([[4, 2]]),
    )
