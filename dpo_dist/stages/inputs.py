"""What several stages open: prepared pairs beside their reference log-probs.

N pairs of a split, B pairs in a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.config import RunConfig
from dpo_dist.data.pairs import Pairs
from dpo_dist.engine import collectives
from dpo_dist.errors import ReferenceStoreError
from dpo_dist.objective.losses import PairLogps
from dpo_dist.plan import scoring_contract, store_root
from dpo_dist.reference_store import explain_miss, open_store


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with their reference log-probs: (N, 2) float32."""

    pairs: Pairs
    reference: torch.Tensor

    def logps(
        self, policy: torch.Tensor, indices: Sequence[int] | npt.NDArray[np.int64]
    ) -> PairLogps:
        """Policy log-probs (B, 2) of the pairs at `indices` beside what the losses need."""
        rows = np.asarray(indices)
        columns = (self.pairs.chosen_lengths[rows], self.pairs.rejected_lengths[rows])
        lengths = torch.from_numpy(np.stack(columns, axis=1)).to(policy.device)
        return PairLogps.from_columns(policy, self.reference[rows].to(policy.device), lengths)


def with_reference(config: RunConfig, pairs: Pairs, layout: str) -> ScoredPairs:
    """Looks the reference up on rank 0 and sends it to the others: 8 bytes a pair.

    Raises ReferenceStoreError on every rank when rows are missing, saying what the store holds
    instead.
    """
    reference = None
    with collectives.same_error_everywhere():
        if collectives.is_first():
            contract = scoring_contract(config, layout)
            store = open_store(store_root(config), contract)
            try:
                reference = store.lookup(pairs.keys, np.arange(len(pairs)))
            except ReferenceStoreError as error:
                held = explain_miss(store_root(config), contract)
                raise ReferenceStoreError(
                    "; ".join([error.found, *held]), error.wanted, error.remedy
                ) from None
    received = collectives.broadcast(reference)
    assert received is not None, "rank 0 sent no reference log-probs"
    return ScoredPairs(pairs, torch.from_numpy(received))
