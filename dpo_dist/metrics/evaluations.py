"""The best evaluation of a run, and when enough evaluations in a row have brought nothing.

Everything here is computed from the evaluations so far, which every checkpoint carries: a run
that was killed and resumed comes to the same answers as an unbroken one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.config.training_section import HeldOutMetric

# what is shown of an evaluation before training and after
SHOWN = ("rewards/accuracies", "rewards/margins", "logps/accuracies")
Evaluation = Mapping[str, Any]  # {"step": 100, "eval_loss": 0.5, ...}; None: not finite


def record(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """An evaluation as checkpoints keep it, from metric names without eval_."""
    named = {f"eval_{name}": value for name, value in metrics.items()}
    return {"step": step} | {k: v if math.isfinite(v) else None for k, v in named.items()}


def ranked_steps(evaluations: Sequence[Evaluation], metric: HeldOutMetric | None) -> list[int]:
    """Steps by their evaluation, best first, of equal ones the earlier; [] without a metric."""
    if metric is None:
        return []
    found = [line for line in evaluations if line.get(metric) is not None]
    return [line["step"] for line in sorted(found, key=lambda line: -_score(line, metric))]


def early_stop(
    evaluations: Sequence[Evaluation], metric: HeldOutMetric, patience: int, min_delta: float
) -> str | None:
    """Why training should end now, or None.

    An evaluation improves when it beats the last one that did by more than `min_delta`; training
    ends after `patience` evaluations in a row that do not.
    """
    best: Evaluation | None = None
    without = 0
    for line in evaluations:
        if line.get(metric) is None:
            without += 1
        elif best is None or _score(line, metric) - _score(best, metric) > min_delta:
            best, without = line, 0
        else:
            without += 1
    if without < patience:
        return None
    held = f"{best[metric]:.4f} of step {best['step']}" if best else "none that was finite"
    last = evaluations[-1]
    return (
        f"early stop at step {last['step']}: {without} evaluations in a row no better than "
        f"{metric} {held} by more than {min_delta:g} (eval.patience {patience})"
    )


def _score(line: Evaluation, metric: HeldOutMetric) -> float:
    """The metric, turned so that more is better."""
    return -line[metric] if metric == "eval_loss" else line[metric]
