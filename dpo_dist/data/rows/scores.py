"""Scores of the two answers, where a source has them."""

import math
from typing import Any

from dpo_dist.data.rows.row import Row, type_name

# Our name -> the name in UltraFeedback and in data made from it.
KNOWN_NAMES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


def score_margin(row: Row, required: bool) -> float | None:
    """chosen_score - rejected_score; None for a row without usable scores.

    Raises DataError for such a row when scores are `required`.
    """
    scores: list[float] = []
    for ours, known in KNOWN_NAMES.items():
        name = known if ours not in row.fields and known in row.fields else ours
        if required and name not in row.fields:
            row.field(name)  # raises with the columns that there are
        value = row.fields.get(name)
        number = _number(value)
        if not math.isfinite(number):
            if not required:
                return None
            found = repr(value) if isinstance(value, str | float) else type_name(value)
            raise row.unusable(f"field {name!r} is {found}", "a number")
        scores.append(number)
    return scores[0] - scores[1]


def _number(value: Any) -> float:
    """The number in a field, also written as text (CSV); NaN when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
