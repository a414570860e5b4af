"""What is due after a step, as tables."""

import pytest

from dpo_dist.training.due import checkpoint_due, evaluation_due, report_due, samples_due


@pytest.mark.parametrize(
    ("step", "ending", "stopping", "due"),
    [
        (4, False, False, True),
        (5, False, False, False),
        (5, True, False, True),
        (5, False, True, True),
        (8, True, True, True),
    ],
)
@pytest.mark.parametrize("is_due", [report_due, checkpoint_due])
def test_reports_and_checkpoints(
    is_due: object, step: int, ending: bool, stopping: bool, due: bool
) -> None:
    assert callable(is_due)
    assert is_due(step, 4, ending=ending, stopping=stopping) is due


@pytest.mark.parametrize(
    ("step", "due"), [(0, False), (1, False), (3, True), (4, False), (6, True), (7, True)]
)
def test_evaluations_belong_to_every_third_step_and_to_the_last(step: int, due: bool) -> None:
    assert evaluation_due(step, 3, num_steps=7) is due


@pytest.mark.parametrize(
    ("every", "step", "ending", "stopping", "due"),
    [
        (None, 4, True, False, False),
        (4, 4, False, False, True),
        (4, 5, False, False, False),
        (4, 5, True, False, True),
        (4, 4, False, True, False),
        (4, 5, True, True, False),
    ],
)
def test_a_run_that_is_stopped_has_no_time_for_samples(
    every: int | None, step: int, ending: bool, stopping: bool, due: bool
) -> None:
    assert samples_due(step, every, ending=ending, stopping=stopping) is due
