"""Held-out accuracy and margin of the export, against the policy as it started.

1. Load the exported model fresh, whole on every rank when it fits, else in ZeRO-3 partitions; of a
   quantized run its adapter on the quantized base, which is what was trained and what the reference
   is compared with.
2. Score the held-out pairs; the numbers before training are the reference store's.
3. Write means over all pairs and per source.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import plan_scoring_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.scoring import score_on_all_ranks
from dpo_dist.engine.model.model_choice import choose_model, load_chosen
from dpo_dist.errors import DataError
from dpo_dist.inputs.frozen_model import open_frozen, place_model
from dpo_dist.inputs.scored_pairs import (
    ScoredPairs,
    objective_of,
    shared_for,
    with_reference,
)
from dpo_dist.metrics.evaluations import SHOWN
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.pair_logps import Terms
from dpo_dist.objective.rewards import reward_metrics
from dpo_dist.run.logs import console, progress_bar
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import Topology, from_environment
from dpo_dist.watch.heartbeat import during


@during("evaluation")
def run(config: RunConfig) -> Path:
    """Scores the held-out pairs with the export and writes evaluate.json."""
    paths, topology = RunDir(config.run.dir), from_environment()
    place = topology.in_teams_of(config.train.sequence_parallel)
    pairs = open_pairs(paths.pairs_dir, "eval")
    if len(pairs) == 0:
        raise DataError(
            f"{paths.pairs_dir} has no held-out pairs",
            "at least one",
            "Set data.eval or data.eval_fraction and prepare the pairs in another run.dir.",
        )
    with collectives.process_group(topology) as device:
        models, quantization = RunModels(config), config.model.quantization
        base_dir = models.base
        choice = choose_model("adapter" if quantization else "export", paths, base_dir)
        placement = place_model(config, base_dir, topology, device, "evaluate")
        model = load_chosen(choice, base_dir, config.model, device, placement.zero3)
        frozen = open_frozen(model, placement)
        (held_out,) = with_reference(models, [pairs], frozen.settle(config))
        scores = _score_all(config, frozen.model, pairs, place, device)
        frozen.take_down()
        if topology.rank == 0:
            scored = {"model": choice.name, "quantization": quantization}
            result = _result(held_out, scores, objective_of(config))
            write_json(paths.evaluate_path, scored | result)
    return paths.evaluate_path


def _score_all(
    config: RunConfig,
    model: torch.nn.Module,
    pairs: Pairs,
    place: Topology,
    device: torch.device,
) -> torch.Tensor:
    """(N, 2) log-probs of all pairs, on every rank."""
    scores = np.zeros((len(pairs), 2), dtype=np.float32)
    waves = plan_scoring_batches(
        pairs.packed_lengths,
        np.arange(len(pairs)),
        place.world_size,
        config.scoring_tokens,
        micro_batches_per_wave=1,
        shared=shared_for(model, pairs),
    )
    with progress_bar("pairs", enabled=collectives.is_first()) as bar:
        task = bar.add_task("evaluate", total=len(pairs))
        for wave in waves:
            own = wave[place.rank]
            terms = Terms(config.objective.ld_alpha)
            indices, logps = score_on_all_ranks(model, own, pairs.token_ids, device, terms)
            scores[indices] = logps
            bar.advance(task, len(indices))
    return torch.from_numpy(scores)


def _result(held_out: ScoredPairs, scores: torch.Tensor, objective: Objective) -> dict[str, Any]:
    """Means before (the reference itself: margins are 0) and after, over all and per source.

    Without a reference nothing is known of before.
    """
    sources = np.array(held_out.pairs.sources)
    groups = {"all": np.arange(len(sources))}
    groups |= {str(name): np.flatnonzero(sources == name) for name in np.unique(sources)}
    result: dict[str, Any] = {"num_pairs": len(sources), "beta": objective.beta}
    before = {} if objective.reference_free else {"before": held_out.reference}
    for state, policy in (before | {"after": scores}).items():
        means = {
            name: {"num_pairs": len(rows)} | _means(held_out, policy[rows], rows, objective)
            for name, rows in groups.items()
        }
        result[state] = means.pop("all") | {"per_source": means}
    return result


def _means(
    held_out: ScoredPairs, policy: torch.Tensor, rows: np.ndarray[Any, Any], objective: Objective
) -> dict[str, float]:
    """TRL's reward metrics, and how often the policy's own log-probs rank a pair right."""
    means = {
        name: float(values.double().mean())
        for name, values in reward_metrics(held_out.logps(policy, rows), objective).items()
    }
    return means | {"logps/accuracies": float((policy[:, 0] > policy[:, 1]).double().mean())}


def print_result(result: dict[str, Any]) -> None:
    """Shows evaluate.json as a table."""
    states = [state for state in ("before", "after") if state in result]
    table = Table("held-out", "metric", *states)
    groups = {"all": [result[state] for state in states]}
    for name in result["after"]["per_source"]:
        groups[name] = [result[state]["per_source"][name] for state in states]
    for name, group in groups.items():
        pairs = f"{name} ({group[-1]['num_pairs']})"
        for i, metric in enumerate(SHOWN):
            values = (f"{means[metric]:.3f}" for means in group)
            table.add_row("" if i else pairs, metric, *values)
    if result["quantization"]:
        table.caption = f"after: the {result['model']} on the {result['quantization']} base"
    console.print(table)
