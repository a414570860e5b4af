"""The reference pass: log-probs of a frozen model over all pairs, once, before training.

1. Refuse what training would refuse, before anything expensive.
2. Rank 0 looks which pairs the store lacks; with none there is nothing to load.
3. Load the reference, whole on every rank when it fits, else in ZeRO-3 partitions.
4. Score the missing pairs in waves; rank 0 appends each wave, so a killed pass goes on from it.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import Plan, plan_scoring_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.scoring import score_on_all_ranks
from dpo_dist.engine.model.policy import PolicyParts, load_policy
from dpo_dist.errors import ArtifactError, ReferenceStoreError
from dpo_dist.inputs.frozen_model import FrozenModel, open_frozen, place_model
from dpo_dist.inputs.scored_pairs import shared_for
from dpo_dist.inputs.work import checked_work
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.pair_logps import Terms
from dpo_dist.reference.contract import MASK_RULES, complete_store, scoring_contract, store_root
from dpo_dist.reference.store import ReferenceStore, explain_miss, open_store
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import update_status
from dpo_dist.run.stop_flag import StopFlag, Stopped
from dpo_dist.run.topology import Topology, from_environment
from dpo_dist.watch.heartbeat import during

_logger = logging.getLogger(__name__)
IndexArray = npt.NDArray[np.int64]
LogpArray = npt.NDArray[np.float32]
SPLITS = ("train", "eval")
MAX_BAD = 20  # pairs without finite numbers after which the model is at fault, not a pair


def run(config: RunConfig) -> Path:
    """Scores what the store lacks; returns the store's folder. Raises Stopped on a signal."""
    paths = RunDir(config.run.dir)
    if config.objective.reference_free:
        return _skip(config, paths)
    models = RunModels(config)
    work = checked_work(models)
    splits, topology = [work.train, work.held_out], from_environment()
    topology.in_teams_of(config.train.sequence_parallel)  # refuses ranks that would be left over
    stop = StopFlag().install()
    with collectives.process_group(topology) as device:
        if directory := collectives.on_first(lambda: _complete(models, paths, splits)):
            return directory
        return _run_pass(models, splits, topology, device, stop)


def _complete(models: RunModels, paths: RunDir, splits: list[Pairs]) -> Path | None:
    """The store's folder when it lacks nothing, without a model; on rank 0."""
    done = complete_store(models, np.concatenate([pairs.keys for pairs in splits]))
    if done is None:
        return None
    layout, store = done
    _logger.info("reference: current, %s rows in %s", store.num_rows, store.directory)
    _write_report(paths, splits, store, layout, num_scored=0)
    return store.directory


def _skip(config: RunConfig, paths: RunDir) -> Path:
    """Says, and writes down, that the objective needs no reference; returns where it is written."""
    why = f"objective.loss {', '.join(config.objective.names)} has no reference"
    if from_environment().rank == 0:
        _logger.info("reference: not needed, %s", why)
        write_json(paths.reference_status_path, {"not_needed": why})
    return paths.reference_status_path


def _run_pass(
    models: RunModels, splits: list[Pairs], topology: Topology, device: torch.device, stop: StopFlag
) -> Path:
    config, is_first = models.config, topology.rank == 0
    paths, terms = RunDir(config.run.dir), Terms(config.objective.ld_alpha)
    reference = _load_reference(models, topology, device)
    layout = reference.settle(config)
    store, todo = _open_store(models, layout, splits)
    num_missing, num_scored = sum(map(len, todo)), 0
    bad: list[dict[str, str]] = []
    place = topology.in_teams_of(config.train.sequence_parallel)
    if is_first:
        _logger.info("reference: %d of %d pairs to score", num_missing, sum(map(len, splits)))
    with during("reference"), progress_bar("pairs", enabled=is_first) as bar:
        task, began = bar.add_task("reference", total=num_missing), time.monotonic()
        for pairs, wave in _waves(config, reference.model, splits, todo, place.world_size):
            own = wave[place.rank]
            scored = score_on_all_ranks(reference.model, own, pairs.token_ids, device, terms)
            num_scored += _append(store, pairs, *scored, bad)
            bar.update(task, completed=num_scored)
            if store is not None and config.reference.part is None:
                progress = {
                    "num_scored": num_scored,
                    "num_missing": num_missing,
                    "pairs_per_second": num_scored / (time.monotonic() - began),
                }
                rows = f"{store.num_rows} reference rows"
                update_status(paths.status_path, reference=progress, progress=rows)
            if any(collectives.gather(bool(stop))):
                raise Stopped(f"reference pass stopped by {stop.signal_name or 'another rank'}")
    _refuse_bad(bad)
    if store is not None and config.reference.part is None:
        _write_report(paths, splits, store, layout, num_scored=num_missing)
    reference.take_down()
    collectives.barrier()
    return collectives.broadcast(store.directory if store is not None else store_root(config))


def _waves(
    config: RunConfig,
    model: torch.nn.Module,
    splits: list[Pairs],
    todo: list[IndexArray],
    world_size: int,
) -> Iterator[tuple[Pairs, Plan]]:
    """What all ranks score together before it is committed, beside the split that it is of."""
    for pairs, missing in zip(splits, todo, strict=True):
        for wave in plan_scoring_batches(
            pairs.packed_lengths, missing, world_size, config.scoring_tokens,
            shared=shared_for(model, pairs),
        ):  # fmt: skip
            yield pairs, wave


def _append(
    store: ReferenceStore | None,
    pairs: Pairs,
    indices: IndexArray,
    scores: LogpArray,
    bad: list[dict[str, str]],
) -> int:
    """Commits the finite rows of a wave on rank 0; the number of its pairs.

    Pairs that score no finite number are added to `bad`, and the pass goes on, unless there are so
    many that the model is at fault.
    """
    finite = np.isfinite(scores).all(axis=1)
    good, rows = indices[finite], scores[finite]
    collectives.on_first(lambda: store and store.append(pairs.keys[good], rows, good))
    bad += [pairs.identity(int(index)) for index in indices[~finite]]
    if len(bad) >= MAX_BAD:
        _refuse_bad(bad)
    return len(indices)


def _refuse_bad(bad: list[dict[str, str]]) -> None:
    """Raises ReferenceStoreError, on every rank alike, naming each pair without finite numbers."""
    if bad:
        named = "".join(f"\n  {pair['key']} ({pair['origin']})" for pair in bad)
        raise ReferenceStoreError(
            f"the reference log-probs of {len(bad)} pairs are not finite:{named}",
            "finite numbers; those of the other pairs are kept",
            "Leave these pairs out by data.leave_out, delete the prepared pairs and run again; or "
            "check the reference weights, or set model.dtype=float32.",
        )


def _open_store(
    models: RunModels, layout: str, splits: list[Pairs]
) -> tuple[ReferenceStore | None, list[IndexArray]]:
    """(The store, on rank 0 and None on the others; what this pass is to score of every split)."""
    opened: ReferenceStore | None = None
    root, part = store_root(models.config), models.config.reference.part

    def look() -> list[IndexArray]:
        nonlocal opened
        contract = scoring_contract(models, layout)
        opened = open_store(root, contract)
        if opened.num_rows == 0:
            for line in explain_miss(root, contract):
                _logger.info("reference: %s", line)
        missing = [own_part(opened.coverage(pairs.keys)[1], part) for pairs in splits]
        # those of a prompt in one wave, where they can share it
        return [
            own if pairs.shared is None else pairs.shared.by_prompt(own)
            for pairs, own in zip(splits, missing, strict=True)
        ]

    todo = collectives.on_first(look)
    return opened, todo


def own_part(missing: IndexArray, part: str | None) -> IndexArray:
    """The share of the pairs that `reference.part` names; by index, so that a part that is started
    again finds its own pairs whatever the others have scored by then."""
    if part is None:
        return missing
    number, count = map(int, part.split("/"))
    return missing[missing % count == number - 1]


def _load_reference(models: RunModels, topology: Topology, device: torch.device) -> FrozenModel:
    config, model_dir, start = models.config, models.reference, models.reference_adapter
    placement = place_model(config, model_dir, topology, device, "reference")
    if topology.rank == 0 and start is not None:
        _logger.info("reference: %s with the adapter %s", model_dir, start)
    adapter = config.adapter if start is not None else None
    parts = PolicyParts(model_dir, config.model, adapter, start)
    return open_frozen(load_policy(parts, device, placement.zero3), placement)


def _write_report(
    paths: RunDir, splits: list[Pairs], store: ReferenceStore, layout: str, num_scored: int
) -> None:
    write_json(
        paths.reference_status_path,
        {
            "store": str(store.directory),
            "contract": store.contract.digest(),
            "layout": layout,
            "num_pairs": {split: len(pairs) for split, pairs in zip(SPLITS, splits, strict=True)},
            "num_scored_now": num_scored,
        },
    )


def status(config: RunConfig) -> dict[str, Any]:
    """Coverage of the store per split and layout, without loading a model."""
    paths = RunDir(config.run.dir)
    if not paths.pairs_dir.is_dir():
        raise ArtifactError(
            f"{paths.pairs_dir} does not exist", "prepared pairs", "Run `dpo-dist prepare` first."
        )
    if config.objective.reference_free:
        return {"not_needed": f"objective.loss {', '.join(config.objective.names)}"}
    report: dict[str, Any] = {"store_dir": str(store_root(config)), "layouts": {}}
    models = RunModels(config)
    for layout in MASK_RULES:
        contract = scoring_contract(models, layout)
        store = open_store(store_root(config), contract)
        coverage = {}
        for split in SPLITS:
            pairs = open_pairs(paths.pairs_dir, split)
            present, missing = store.coverage(pairs.keys)
            coverage[split] = {"present": present, "missing": len(missing), "total": len(pairs)}
        report["layouts"][layout] = {"contract": contract.digest(), "splits": coverage}
        if store.num_rows == 0:
            report["layouts"][layout]["holds_instead"] = explain_miss(store_root(config), contract)
    return report
