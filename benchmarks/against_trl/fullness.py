"""How full the micro-batches of a plan are, and how evenly the ranks are loaded; needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.against_trl.cases import Rows
from benchmarks.against_trl.rows import make_texts, token_ids
from dpo_dist.data.batches import plan_micro_batches, plan_scoring_batches, step_pair_indices

GLOBAL_BATCH, BUDGETS, RANKS = 256, (8192, 16384), (1, 2, 8)
NUM_STEPS = 4


def measure(model: str, real: str | None) -> dict[str, Any]:
    """Lines of (ranks, budget, fill and imbalance of training, fill of the reference pass)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = Rows(10**6, length=1024) if real else Rows(300, share=30, length=600)
    pairs = token_ids(make_texts(rows, tokenizer, Path(real) if real else None), tokenizer, 1024)
    lengths = np.array([sum(map(len, pair)) for pair in pairs])
    lines = []
    for ranks in RANKS:
        for budget in BUDGETS:
            fills, waits = [], []
            for step in range(NUM_STEPS):
                indices = step_pair_indices(step, len(lengths), GLOBAL_BATCH, 0)
                plan = plan_micro_batches(lengths, indices, ranks, budget)
                tokens = _tokens(plan, lengths)
                fills.append(lengths[indices].sum() / (tokens.size * budget))
                waits.append(tokens.max(axis=0).sum() / tokens.mean(axis=0).sum() - 1)
            waves = plan_scoring_batches(lengths, np.arange(len(lengths)), ranks, budget)
            sizes = np.concatenate([_tokens(wave, lengths).ravel() for wave in waves])
            lines.append(
                {
                    "ranks": ranks, "budget": budget, "fill": float(np.mean(fills)),
                    "imbalance": float(np.mean(waits)),
                    "reference_fill": float(lengths.sum() / (sizes.size * budget)),
                }
            )  # fmt: skip
    return {"pairs": len(pairs), "mean_tokens": float(lengths.mean()), "lines": lines}


def _tokens(plan: Any, lengths: Any) -> Any:
    """(ranks, micro-steps) tokens, those of fillers too."""
    return np.array([[lengths[list(b.pair_indices)].sum() for b in own] for own in plan])
