"""The best evaluation and the end of patience, from the evaluations alone."""

import math
from typing import Any

import pytest

from dpo_dist.metrics.evaluations import early_stop, ranked_steps, record


def evaluations(name: str, *values: float) -> list[dict[str, Any]]:
    return [record(10 * i, {name: value}) for i, value in enumerate(values, start=1)]


def test_the_largest_is_best_and_of_equal_ones_the_earlier() -> None:
    lines = evaluations("rewards/accuracies", 0.5, 0.75, 0.625, 0.75)
    assert ranked_steps(lines, "eval_rewards/accuracies") == [20, 40, 30, 10]


def test_the_smallest_loss_is_best() -> None:
    assert ranked_steps(evaluations("loss", 0.6, 0.5, 0.7), "eval_loss") == [20, 10, 30]


def test_what_is_not_finite_is_never_best() -> None:
    lines = evaluations("rewards/margins", math.nan, 1.0, math.inf)
    assert lines[0] == {"step": 10, "eval_rewards/margins": None}
    assert ranked_steps(lines, "eval_rewards/margins") == [20]


def test_without_a_metric_nothing_is_ranked() -> None:
    assert ranked_steps(evaluations("loss", 0.6), None) == []


def test_patience_counts_evaluations_in_a_row_that_are_no_better() -> None:
    lines = evaluations("rewards/margins", 1.0, 0.9, 2.0, 1.5, 2.0)
    assert early_stop(lines[:4], "eval_rewards/margins", 2, 0.0) is None
    assert early_stop(lines, "eval_rewards/margins", 3, 0.0) is None
    assert early_stop(lines, "eval_rewards/margins", 2, 0.0) == (
        "early stop at step 50: 2 evaluations in a row no better than eval_rewards/margins 2.0000 "
        "of step 30 by more than 0 (eval.patience 2)"
    )


def test_small_steps_add_up_against_min_delta() -> None:
    """Better is meant against the last one that counted, so a slow climb is no end."""
    lines = evaluations("loss", 1.0, 0.96, 0.92, 0.88, 0.84)
    assert early_stop(lines, "eval_loss", 2, 0.05) is None
    assert early_stop(lines, "eval_loss", 2, 0.2) is not None
    assert early_stop(lines, "eval_loss", 2, 0.0) is None


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_finite_is_no_improvement(number: int) -> None:
    lines = evaluations("loss", *[math.nan] * number)
    stopped = early_stop(lines, "eval_loss", 2, 0.0)
    assert (stopped is not None) == (number == 2)
    assert stopped is None or "eval_loss none that was finite" in stopped
