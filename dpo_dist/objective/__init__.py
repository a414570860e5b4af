"""The losses for programs of your own: log-probs of preference pairs in, a loss a pair out.

docs/python.md describes these names; they stay when the files behind them move.
"""

from dpo_dist.objective.mixture import pair_losses
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import PairLogps, Terms
from dpo_dist.objective.rewards import reward_metrics

__all__ = ["Objective", "PairLogps", "Terms", "pair_losses", "reward_metrics"]
