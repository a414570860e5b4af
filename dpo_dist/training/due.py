"""What is due after an optimizer step; steps count from 1, and `ending` is the run's last step."""


def report_due(step: int, every_steps: int, *, ending: bool, stopping: bool) -> bool:
    """Whether the metrics since the last report are written."""
    return step % every_steps == 0 or ending or stopping


def evaluation_due(step: int, every_steps: int, num_steps: int, *, on_start: bool = False) -> bool:
    """Whether an evaluation belongs to this step: every so many, the last, and 0 if `on_start`."""
    if step == 0:
        return on_start
    return step == num_steps or step % every_steps == 0


def checkpoint_due(step: int, every_steps: int, *, ending: bool, stopping: bool) -> bool:
    """Whether a checkpoint is saved."""
    return step % every_steps == 0 or ending or stopping


def samples_due(step: int, every_steps: int | None, *, ending: bool, stopping: bool) -> bool:
    """Whether held-out prompts are answered; a run that is stopped has no time for it."""
    return every_steps is not None and not stopping and (step % every_steps == 0 or ending)
