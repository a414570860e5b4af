"""What the curves of a run warn of: both log-probs falling, and only then."""

import math
import random
from typing import Any

import pytest

from dpo_dist.metrics.curves import change_of, displacement, points, smoothed, spread


def run_of(
    chosen: float, rejected: float, steps: int = 200, noise: float = 5.0, start: float = -200.0
) -> list[dict[str, Any]]:
    """Training lines whose log-probs move by `chosen` and `rejected` nats over the run."""
    chance = random.Random(0)
    return [
        {
            "step": step,
            "logps/chosen": start + chosen * step / steps + chance.gauss(0, noise),
            "logps/rejected": start + rejected * step / steps + chance.gauss(0, noise),
        }
        for step in range(1, steps + 1)
    ]


def test_both_falling_is_a_warning_with_the_numbers() -> None:
    warning = displacement(run_of(-40, -90, noise=0.0))
    assert warning is not None
    assert "training batches: chosen -204.1 -> -236.1 nats (-32.0, noise 1.0)" in warning
    assert "rejected -209.2 -> -281.2 nats (-72.0, noise 2.4)" in warning


@pytest.mark.parametrize(("chosen", "rejected"), [(10, -90), (-40, 20), (0, 0), (30, 30)], ids=str)
def test_one_that_does_not_fall_is_none(chosen: float, rejected: float) -> None:
    assert displacement(run_of(chosen, rejected)) is None


def test_a_fall_within_the_noise_is_none() -> None:
    assert displacement(run_of(-10, -10, steps=20, noise=40.0)) is None
    assert displacement(run_of(-10, -10, steps=20, noise=0.1)) is not None


def test_a_trifle_is_none() -> None:
    assert displacement(run_of(-1, -1, noise=0.0)) is None


def test_few_steps_tell_nothing() -> None:
    assert displacement(run_of(-90, -90, steps=9, noise=0.0)) is None
    assert displacement([]) is None


def test_held_out_pairs_come_first_since_they_are_the_same_ones() -> None:
    lines = run_of(0, 0)
    for step, chosen in ((100, -210.0), (200, -230.0)):
        lines.append({"step": step, "eval_logps/chosen": chosen, "eval_logps/rejected": chosen})
    assert "held-out pairs: chosen -210.0 -> -230.0 nats (-20.0)," in str(displacement(lines))
    assert displacement(lines[:-1]) is None


def test_numbers_that_are_not_finite_are_gaps() -> None:
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}, {"step": 3, "other": 1.0}]
    steps, values = points(lines, "loss")
    assert steps == [1, 2] and math.isnan(values[0]) and values[1] == 0.5
    assert math.isnan(smoothed(values)[0]) and smoothed(values)[1] == 0.5
    assert change_of([{"step": 1, "eval_loss": None}], "eval_loss") is None


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    means = smoothed([0.0] * 100 + [1.0] * 100)
    assert means[99] == pytest.approx(0.0) and 0.9 < means[-1] < 1.0


def test_lines_of_a_table_are_spread_evenly_with_both_ends() -> None:
    lines = [{"step": step} for step in range(1, 102)]
    assert [line["step"] for line in spread(lines, 5)] == [1, 26, 51, 76, 101]
    assert spread(lines[:3], 20) == lines[:3]
    assert spread(lines[:1], 6) == lines[:1]
