"""What is due after a step, as tables."""

import pytest

from dpo_dist.config.section import steps_of
from dpo_dist.training.due import (
    checkpoint_due,
    evaluation_due,
    report_due,
    samples_due,
)


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


def test_the_evaluation_before_the_first_step_is_asked_for() -> None:
    assert evaluation_due(0, 3, num_steps=7, on_start=True)
    assert not evaluation_due(1, 3, num_steps=7, on_start=True)


@pytest.mark.parametrize("num_steps", [1, 7, 30, 1000])
@pytest.mark.parametrize("interval", [0.5, 0.1, 0.3, 0.001, 0.9999])
def test_a_share_of_the_steps_is_rounded_up_as_in_transformers(
    interval: float, num_steps: int
) -> None:
    from transformers import TrainerState, TrainingArguments

    arguments = TrainingArguments(save_steps=interval, use_cpu=True, report_to="none")
    state = TrainerState()
    state.compute_steps(arguments, num_steps)
    assert steps_of(interval, num_steps) == state.save_steps
    assert steps_of(4, num_steps) == 4


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
