"""What the page says of a case, from what its processes returned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Figures = dict[str, Any]


def of_case(result: dict[str, Any]) -> dict[str, Figures]:
    """system -> its figures: medians over rounds, counts of all ranks."""
    return {
        system: _of_system(rounds, result["facts"]) for system, rounds in result["systems"].items()
    }


def _of_system(rounds: Sequence[Sequence[Figures]], facts: Figures) -> Figures:
    pairs, firsts = facts["pairs"], [ranks[0] for ranks in rounds]
    train = [pairs / max(rank["step_s"] for rank in ranks) for ranks in rounds]
    reference = [pairs / max(rank["reference_s"] for rank in ranks) for ranks in rounds]
    figures: Figures = {
        "train": statistics.median(train),
        "train_spread": spread(train),
        "reference": statistics.median(reference),
        "reference_spread": spread(reference),
        "mib": statistics.median(max(rank["mib"] for rank in ranks) for ranks in rounds),
        "reference_mib": statistics.median(
            max(rank["reference_mib"] for rank in ranks) for ranks in rounds
        ),
        "tokens_per_unique": firsts[0]["tokens"][-1] / facts["unique_tokens"],
        "micro_batches": firsts[0]["micro_batches"],
        "calls": sum(count for count, _ in firsts[0]["collectives"].values()),
        "mib_exchanged": sum(size for _, size in firsts[0]["collectives"].values()) / 2**20,
        "losses": firsts[0]["losses"],
        "logps": firsts[0]["logps"],
    }
    if "tflop" in firsts[0]:
        figures |= {name: firsts[0][name] for name in ("tflop", "live_mib")}
        figures["tflops"] = figures["tflop"] * figures["train"] / pairs
    return figures


def spread(values: Sequence[float]) -> float:
    """From the least to the most, as a share of the median."""
    return (max(values) - min(values)) / statistics.median(values)


def difference(one: Figures, other: Figures, name: str) -> float:
    """The largest absolute difference of `losses` or `logps`."""
    return max(abs(a - b) for a, b in zip(_flat(one[name]), _flat(other[name]), strict=True))


def _flat(values: Sequence[Any]) -> list[float]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]
