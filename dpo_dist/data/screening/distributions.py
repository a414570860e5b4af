"""How lengths and scores are distributed: histograms, and whether the chosen answer is the longer.

N pairs, counted as often as they are trained on.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.data.drop_reasons import KEPT
from dpo_dist.data.screening.tokenized_rows import PairColumns
from dpo_dist.reference.arrays import IntArray
from dpo_dist.wording import nice_step

NUM_BINS = 60
BIASED_SHARE = 0.7  # a rule that looks at nothing but length is right in so many pairs
PAIRS_FOR_WARNING = 50  # chance alone gives 70 % of 50 pairs seven times in a thousand


def length_bias(chosen: IntArray, rejected: IntArray) -> dict[str, float]:
    """Shares of pairs by which answer has more scored tokens, and the means; of (N,) lengths."""
    if len(chosen) == 0:
        return {}
    return {
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((chosen < rejected).mean()),
        "same_length": float((chosen == rejected).mean()),
        "mean_chosen": float(chosen.mean()),
        "mean_rejected": float(rejected.mean()),
        "mean_difference": float((chosen - rejected).mean()),
    }


def is_biased(bias: dict[str, float], num_pairs: int) -> bool:
    """Whether one answer is so often the longer one that length alone would win."""
    if num_pairs < PAIRS_FOR_WARNING:
        return False
    return max(bias["chosen_longer"], bias["rejected_longer"]) >= BIASED_SHARE


def describe_bias(bias: dict[str, float]) -> str:
    """The bias in a line: `chosen is longer in 62% of pairs, ...`."""
    side = "chosen" if bias["chosen_longer"] >= bias["rejected_longer"] else "rejected"
    return (
        f"{side} is longer in {bias[f'{side}_longer']:.0%} of pairs; on average chosen has "
        f"{bias['mean_chosen']:,.1f} tokens, rejected {bias['mean_rejected']:,.1f}, "
        f"{bias['mean_difference']:+,.1f}"
    )


def histograms(columns: PairColumns) -> dict[str, Any]:
    """Histograms of the kept pairs of a split: name -> edges, and counts of each series.

    Of answers the scored tokens count. `difference` is chosen - rejected, one series a source.
    `score_margin` is of all rows that have scores, also of those dropped.
    """
    kept = columns.reasons == KEPT
    rows = np.repeat(np.flatnonzero(kept), columns.copies[kept])
    prompt, chosen, rejected = (
        lengths[rows]
        for lengths in (columns.prompt_lengths, columns.chosen_scored, columns.rejected_scored)
    )
    difference, source = chosen - rejected, columns.source[rows]
    by_source = {
        opened.name: difference[source == index]
        for index, opened in enumerate(columns.sources)
        if (source == index).any()
    }
    found = {
        "prompt": _histogram({"prompt": prompt}),
        "answers": _histogram({"chosen": chosen, "rejected": rejected}),
        "difference": _histogram(by_source, around_zero=True),
    }
    scored = np.isfinite(columns.score_margins)
    if scored.any():
        margins = {
            opened.name: columns.score_margins[scored & (columns.source == index)]
            for index, opened in enumerate(columns.sources)
            if (scored & (columns.source == index)).any()
        }
        found["score_margin"] = _histogram(margins, around_zero=True, whole=False)
    return found


def _histogram(
    series: dict[str, npt.NDArray[Any]], around_zero: bool = False, whole: bool = True
) -> dict[str, Any]:
    """Bins [low, high) of a round width, one of them beginning at 0; symmetric `around_zero`."""
    values = np.concatenate(list(series.values())) if series else np.zeros(0)
    high = float(np.abs(values).max(initial=0))
    width = nice_step(2 * high if around_zero else high, NUM_BINS)
    width = max(1.0, width) if whole else width
    last = math.floor(high / width + 1e-9) + 1
    edges = np.arange(-last if around_zero else 0, last + 1) * width
    counts = {name: np.histogram(found, edges)[0].tolist() for name, found in series.items()}
    # 3 * 0.1 is 0.30000000000000004
    shown = edges.astype(int).tolist() if whole else [float(f"{edge:.12g}") for edge in edges]
    return {"edges": shown, "counts": counts}
