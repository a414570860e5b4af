"""The reference pass: log-probs of a frozen model over all pairs, once, before training.

1. Refuse what training would refuse, before anything expensive.
2. Rank 0 looks which pairs the store lacks; with none there is nothing to load.
3. Load the reference, whole on every rank when it fits, else in ZeRO-3 partitions.
4. Score the missing pairs in waves; rank 0 appends each wave, so a killed pass goes on from it.
"""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from dpo_dist.config.run_config import RunConfig, scoring_budget
from dpo_dist.data.batches import Plan, plan_scoring_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.forward.scoring import score_on_all_ranks
from dpo_dist.engine.model.policy import load_policy, settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.errors import ArtifactError
from dpo_dist.inputs.sizes import checked_work, count_shape, make_setup, read_sizes
from dpo_dist.model_files.files import weight_files
from dpo_dist.model_files.of_run import reference_adapter_dir, reference_model_dir
from dpo_dist.objective.pair_logps import Terms
from dpo_dist.planning.estimate import GIB, parameter_lines, total
from dpo_dist.reference.contract import complete_store, scoring_contract, store_root
from dpo_dist.reference.store import ReferenceStore, explain_miss, open_store
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import update_status
from dpo_dist.run.stop_flag import StopFlag, Stopped
from dpo_dist.run.topology import Topology, from_environment

_logger = logging.getLogger(__name__)
IndexArray = npt.NDArray[np.int64]
SPLITS = ("train", "eval")
WHOLE_MODEL_SHARE = 0.7  # of a rank's memory for whole weights; the rest is for activations


def run(config: RunConfig) -> Path:
    """Scores what the store lacks; returns the store's folder. Raises Stopped on a signal."""
    paths = RunDir(config.run.dir)
    if config.objective.reference_free:
        return _skip(config, paths)
    work = checked_work(config)
    splits, topology = [work.train, work.held_out], from_environment()
    stop = StopFlag().install()
    with collectives.process_group(topology) as device:
        if directory := _complete(config, paths, splits):
            return directory
        return _run_pass(config, paths, splits, topology, device, stop)


def _complete(config: RunConfig, paths: RunDir, splits: list[Pairs]) -> Path | None:
    """The store's folder when it lacks nothing; looked up by rank 0 alone, without a model."""
    directory = None
    with collectives.same_error_everywhere():
        if collectives.is_first():
            done = complete_store(config, np.concatenate([pairs.keys for pairs in splits]))
            if done is not None:
                layout, store = done
                directory = store.directory
                _logger.info("reference: current, %s rows in %s", store.num_rows, directory)
                _write_report(paths, splits, store, layout, num_scored=0)
    return collectives.broadcast(directory)


def _skip(config: RunConfig, paths: RunDir) -> Path:
    """Says, and writes down, that the objective needs no reference; returns where it is written."""
    why = f"objective.loss {', '.join(config.objective.names)} has no reference"
    if from_environment().rank == 0:
        _logger.info("reference: not needed, %s", why)
        write_json(paths.reference_status_path, {"not_needed": why})
    return paths.reference_status_path


def _run_pass(
    config: RunConfig,
    paths: RunDir,
    splits: list[Pairs],
    topology: Topology,
    device: torch.device,
    stop: StopFlag,
) -> Path:
    model, layout, engine = _load_reference(config, topology, device)
    store, todo = _open_store(config, layout, splits)
    num_missing = sum(map(len, todo))
    num_pairs, num_scored = sum(map(len, splits)), 0
    if topology.rank == 0:
        _logger.info("reference: %d of %d pairs to score", num_missing, num_pairs)
    with progress_bar("pairs", enabled=topology.rank == 0) as bar:
        task, began = bar.add_task("reference", total=num_missing), time.monotonic()
        for pairs, missing in zip(splits, todo, strict=True):
            for wave in plan_scoring_batches(
                pairs.packed_lengths, missing, topology.world_size, scoring_budget(config)
            ):
                num_scored += _score_wave(config, model, store, pairs, wave, topology, device)
                bar.update(task, completed=num_scored)
                if store is not None and config.reference.part is None:
                    update_status(
                        paths.status_path,
                        reference={
                            "num_scored": num_scored,
                            "num_missing": num_missing,
                            "pairs_per_second": num_scored / (time.monotonic() - began),
                        },
                        progress=f"{store.num_rows} reference rows",
                    )
                if any(collectives.gather(bool(stop))):
                    raise Stopped(f"reference pass stopped by {stop.signal_name or 'another rank'}")
    if store is not None and config.reference.part is None:
        _write_report(paths, splits, store, layout, num_scored=num_missing)
    if engine is not None:
        zero.take_down(engine)
    collectives.barrier()
    return collectives.broadcast(store.directory if store is not None else store_root(config))


def _open_store(
    config: RunConfig, layout: str, splits: list[Pairs]
) -> tuple[ReferenceStore | None, list[IndexArray]]:
    """(The store, on rank 0 and None on the others; what this pass is to score of every split)."""
    store, todo = None, []
    with collectives.same_error_everywhere():
        if collectives.is_first():
            contract = scoring_contract(config, layout)
            store = open_store(store_root(config), contract)
            if store.num_rows == 0:
                for line in explain_miss(store_root(config), contract):
                    _logger.info("reference: %s", line)
            todo = [own_part(store.coverage(p.keys)[1], config.reference.part) for p in splits]
    return store, collectives.broadcast(todo)


def own_part(missing: IndexArray, part: str | None) -> IndexArray:
    """The share of the pairs that `reference.part` names; by index, so that a part that is started
    again finds its own pairs whatever the others have scored by then."""
    if part is None:
        return missing
    number, count = map(int, part.split("/"))
    return missing[missing % count == number - 1]


def _load_reference(
    config: RunConfig, topology: Topology, device: torch.device
) -> tuple[torch.nn.Module, str, Any]:
    """(what `score` takes, its layout, the DeepSpeed engine or None)."""
    model_dir = reference_model_dir(config)
    whole, reason = collectives.broadcast(_fits_whole(config, model_dir, topology, device))
    if topology.rank == 0:
        _logger.info("reference: %s (%s)", "whole on every rank" if whole else "ZeRO-3", reason)
    start = reference_adapter_dir(config)
    if topology.rank == 0 and start is not None:
        _logger.info("reference: %s with the adapter %s", model_dir, start)
    sharding = (
        None if whole else ds_config.inference_config(config.model.dtype, topology.world_size)
    )
    policy = load_policy(
        model_dir, config.model, config.adapter if start is not None else None,
        device=device, zero3=sharding, start=start,
    )  # fmt: skip
    scorer = PairScorer(policy.requires_grad_(False).eval())
    if sharding is None:
        return scorer, settle_layout(scorer, scorer, config.model, device), None
    engine = zero.start_inference(scorer, sharding)
    return engine, settle_layout(engine, scorer, config.model, device), engine


def _fits_whole(
    config: RunConfig, model_dir: Path, topology: Topology, device: torch.device
) -> tuple[bool, str]:
    """Whether every rank can hold all weights, and why."""
    if config.reference.sharding != "auto":
        return config.reference.sharding == "whole", "reference.sharding"
    weights_gib = _weights_gib(config, model_dir)
    if device.type == "cuda":
        memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    else:
        memory_gib = psutil.virtual_memory().available / topology.local_world_size / 2**30
    limit_gib = WHOLE_MODEL_SHARE * memory_gib
    return weights_gib <= limit_gib, (
        f"weights {weights_gib:.1f} GiB, {WHOLE_MODEL_SHARE:.0%} of a rank's "
        f"{memory_gib:.1f} GiB is {limit_gib:.1f} GiB"
    )


def _weights_gib(config: RunConfig, model_dir: Path) -> float:
    """Weights of the reference as they lie in memory."""
    if config.model.quantization is not None:
        setup = replace(
            make_setup(config, 1),
            shape=count_shape(config, None, str(model_dir)),
            sharding=read_sizes("zero0"),
        )
        return total(list(parameter_lines(setup))) / GIB
    stored = sum(path.stat().st_size for path in weight_files(model_dir, True))
    return stored / GIB * (2 if config.model.dtype == "float32" else 1)


def _score_wave(
    config: RunConfig,
    model: torch.nn.Module,
    store: ReferenceStore | None,
    pairs: Pairs,
    wave: Plan,
    topology: Topology,
    device: torch.device,
) -> int:
    """Scores this rank's share, gathers, and commits the wave on rank 0; pairs scored."""
    wave_indices, wave_scores = score_on_all_ranks(
        model, wave[topology.rank], pairs.token_ids, device, Terms(config.objective.ld_alpha)
    )
    with collectives.same_error_everywhere():
        if store is not None:
            store.append(pairs.keys[wave_indices], wave_scores, wave_indices)
    return len(wave_indices)


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
    for layout in ("packed", "padded"):
        contract = scoring_contract(config, layout)
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
