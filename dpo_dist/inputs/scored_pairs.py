"""What several stages open: pairs beside their reference log-probs, the objective, a tokenizer.

N pairs of a split, B pairs in a micro-batch, K columns that a forward makes of a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.pairs import Pairs
from dpo_dist.data.shared_parts import SharedParts
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import upload
from dpo_dist.engine.forward.pair_scorer import scorer_of
from dpo_dist.errors import ReferenceStoreError
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import COMPLETIONS, PairLogps, Terms
from dpo_dist.reference.arrays import IntArray, LogpArray
from dpo_dist.reference.contract import scoring_contract, store_root
from dpo_dist.reference.store import explain_miss, open_store
from dpo_dist.run.manifest import digest_of_hex
from dpo_dist.run.run_dir import RunDir

Indices = Sequence[int] | IntArray


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with their reference log-probs: (N, 2) float32."""

    pairs: Pairs
    reference: torch.Tensor

    @property
    def reference_digest(self) -> str:
        """Hex SHA-256 that a resume must find unchanged: of the bytes as hex digits in quotes."""
        return digest_of_hex(self.reference.numpy().reshape(-1).view(np.uint8).data)

    def logps(
        self,
        policy: torch.Tensor,
        indices: Indices,
        terms: Terms = COMPLETIONS,
        step: Indices | None = None,
    ) -> PairLogps:
        """Columns (B, K) of the pairs at `indices` beside what the losses need.

        `step` are the pairs whose mean the loss is, for losses per token; by default the same.
        """
        rows, step_rows = np.asarray(indices), np.asarray(indices if step is None else step)
        own, of_step = self.pairs.lengths_of(rows), self.pairs.lengths_of(step_rows)
        lengths = upload(torch.from_numpy(own), policy.device)
        return PairLogps.from_columns(
            policy,
            upload(self.reference[rows], policy.device),
            lengths[:, 1:],
            terms,
            prompt_lengths=lengths[:, 0],
            mean_chosen_length=float(of_step[:, 1].mean()),
            mean_sequence_length=float((of_step[:, 0] - 1 + of_step[:, 1]).mean()),
        )

    def by_source(self, indices: IntArray) -> Iterator[tuple[str, IntArray]]:
        """What to put behind a metric's name, and which of `indices` it is of.

        All of them under "", then, where there are several sources, each under "/NAME".
        """
        yield "", np.arange(len(indices))
        sources = self.pairs.sources[indices]
        names = np.unique(sources).tolist()
        for name in names if len(names) > 1 else ():
            yield f"/{name}", np.flatnonzero(sources == name)


def shared_for(model: torch.nn.Module, pairs: Pairs) -> SharedParts | None:
    """What the pairs share, for a plan of micro-batches; None where each has to stand alone."""
    return pairs.shared if scorer_of(model).shares_prompts else None


def objective_of(config: RunConfig) -> Objective:
    """The objective as the losses read it."""
    section = config.objective
    settings = section.model_dump(exclude={"loss", "loss_weights"})
    return Objective(
        losses=section.weighted_losses, reference_free=section.reference_free, **settings
    )


def distinct_prompts(pairs: Pairs, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts that differ, or of all when there are fewer."""
    distinct: dict[tuple[int, ...], None] = {}
    for index in range(len(pairs)):
        distinct[tuple(int(token) for token in pairs.token_ids(index)[0])] = None
        if len(distinct) == count:
            break
    return [list(prompt) for prompt in distinct]


def with_reference(models: RunModels, splits: Sequence[Pairs], layout: str) -> list[ScoredPairs]:
    """Looks the reference up on rank 0 and sends it to the others: 8 bytes a pair.

    An objective without a reference gets zeros.

    Raises ReferenceStoreError on every rank when rows are missing, saying what the store holds
    instead.
    """
    if models.config.objective.reference_free:
        return [ScoredPairs(pairs, torch.zeros(len(pairs), 2)) for pairs in splits]
    found: list[LogpArray] = []

    def look_up() -> list[int]:
        root, contract = store_root(models.config), scoring_contract(models, layout)
        try:
            store = open_store(root, contract)
            found.extend(store.lookup(pairs.keys) for pairs in splits)
        except ReferenceStoreError as error:
            told = "; ".join([error.found, *explain_miss(root, contract)])
            raise ReferenceStoreError(told, error.expected, error.remedy) from None
        return list(map(len, found))

    numbers = collectives.on_first(look_up)
    rows = map(torch.from_numpy, found) if found else (torch.empty(n, 2) for n in numbers)
    return [
        ScoredPairs(pairs, collectives.broadcast_tensor(reference))
        for pairs, reference in zip(splits, rows, strict=True)
    ]


def load_chat_tokenizer(config: RunConfig, folder: Path, is_adapter: bool, base_dir: Path) -> Any:
    """The tokenizer to talk to a model with, under the template that the run was trained with.

    A whole model from elsewhere keeps its own tokenizer, and its own template if it has one.
    """
    trusted, template = config.model.trust_remote_code, resolve_template(config.data.chat_template)
    exports = RunDir(config.run.dir).export_dir.resolve()
    ours = is_adapter or folder == base_dir or folder.resolve().is_relative_to(exports)
    if not ours:
        own = load_tokenizer(folder, None, trusted)
        return own if own.chat_template else load_tokenizer(folder, template, trusted)
    return load_tokenizer(base_dir, template, trusted)
