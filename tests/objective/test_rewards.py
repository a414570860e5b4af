"""The reward metrics by hand; that they equal TRL's log is in test_losses.py."""

import dataclasses

import pytest
import torch

from dpo_dist.objective.losses import sigmoid
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps
from dpo_dist.objective.rewards import METRIC_NAMES, metric_means, metric_sums, reward_metrics


def random_logps(num_pairs: int, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    policy = -100 * torch.rand(num_pairs, 2, generator=generator)
    return PairLogps.from_columns(
        policy=policy.requires_grad_(),
        reference=-100 * torch.rand(num_pairs, 2, generator=generator),
        lengths=torch.randint(1, 20, (num_pairs, 2), generator=generator),
    )


def take(logps: PairLogps, pairs: slice) -> PairLogps:
    vectors = {k: v[pairs] for k, v in vars(logps).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(logps, **vectors)


def test_metrics_by_hand() -> None:
    logps = PairLogps.from_columns(
        policy=torch.tensor([[-8.0, -9.0], [-5.0, -5.0], [-7.0, -1.0]]),
        reference=torch.tensor([[-10.0, -5.0], [-5.0, -5.0], [-3.0, -3.0]]),
        lengths=torch.ones(3, 2, dtype=torch.long),
    )
    metrics = {
        name: values.tolist() for name, values in reward_metrics(logps, Objective(beta=0.5)).items()
    }
    assert metrics == {
        "rewards/chosen": [1.0, 0.0, -2.0],
        "rewards/rejected": [-2.0, 0.0, 1.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a tie is not accurate
        "rewards/margins": [3.0, 0.0, -3.0],
        "logps/chosen": [-8.0, -5.0, -7.0],
        "logps/rejected": [-9.0, -5.0, -1.0],
    }


def test_without_a_reference_everything_is_per_token() -> None:
    logps = PairLogps.from_columns(
        policy=torch.tensor([[-8.0, -9.0]]),
        reference=torch.zeros(1, 2),
        lengths=torch.tensor([[2, 3]]),
    )
    objective = Objective(losses=(("simpo", 1.0),), beta=2.0, reference_free=True)
    metrics = {name: values.tolist() for name, values in reward_metrics(logps, objective).items()}
    assert metrics == {
        "rewards/chosen": [-8.0],
        "rewards/rejected": [-6.0],
        "rewards/accuracies": [0.0],
        "rewards/margins": [-2.0],
        "logps/chosen": [-4.0],
        "logps/rejected": [-3.0],
    }


@pytest.mark.parametrize("cuts", [[0, 64], [0, 1, 64], [0, 7, 9, 40, 64]])
def test_sums_do_not_depend_on_the_packing(cuts: list[int]) -> None:
    logps = random_logps(64)
    losses = sigmoid(logps, Objective())
    parts = [
        metric_sums(take(logps, slice(start, stop)), losses[start:stop], Objective())
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]
    total = torch.stack(parts).sum(dim=0)
    assert total.dtype == torch.float64 and not total.requires_grad
    assert total.shape == (len(METRIC_NAMES),)
    assert total[METRIC_NAMES.index("num_pairs")] == 64

    means = metric_means(total)
    expected = {"loss": losses, **reward_metrics(logps, Objective())}
    assert means == pytest.approx(
        {name: values.double().mean().item() for name, values in expected.items()}, rel=1e-12
    )


def test_no_pairs_have_no_mean() -> None:
    with pytest.raises(AssertionError, match=r"metrics of 0\.0 pairs"):
        metric_means(torch.zeros(len(METRIC_NAMES), dtype=torch.float64))
