"""The forward for programs of your own: token ids of preference pairs in, log-probs out.

docs/python.md describes these names; they stay when the files behind them move.
"""

from dpo_dist.engine.forward.layout_choice import Settled, settle
from dpo_dist.engine.forward.packing import PackedPairs, PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, score_pairs

__all__ = [
    "Layout",
    "PackedPairs",
    "PairIds",
    "PairScorer",
    "Settled",
    "pack_pairs",
    "score_pairs",
    "settle",
]
