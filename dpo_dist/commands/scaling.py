"""How a run scales: the time of a step, of the run, and what it costs, on 1, 2, 4, ... nodes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import plan_micro_batches, step_pair_indices
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.inputs.setup import make_setup, shares_prompts
from dpo_dist.inputs.work import Work as PreparedWork
from dpo_dist.inputs.work import prepared_work, tokens_of
from dpo_dist.planning.scaling.hardware import LINK_SHARE, Hardware, hardware_of
from dpo_dist.planning.scaling.timing import Scale, Tokens, Work, scale
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import duration
from dpo_dist.run.topology import count_places

MOST_NODES = 64


@dataclass(frozen=True)
class Nodes:
    """What is asked: numbers of nodes, and what each of them is."""

    counts: Sequence[int]
    gpu: str
    gpus_per_node: int
    link_gbit: float
    utilization: float
    gpu_hour: float | None


def nodes_of(text: str) -> list[int]:
    """The numbers of `1,2,4`. Raises ConfigError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= MOST_NODES for part in parts):
        raise ConfigError(
            f"--nodes {text}", f"numbers from 1 to {MOST_NODES}, as in 1,2,4", "Correct it."
        )
    return [int(part) for part in parts]


def print_scaling(config: RunConfig, nodes: Nodes, as_json: bool) -> None:
    """Prints a line for each number of nodes; errors as `scales_of`."""
    hardware = hardware_of(
        nodes.gpu, config.model.dtype, nodes.gpus_per_node, nodes.link_gbit, nodes.utilization
    )
    scales = scales_of(config, hardware, nodes.counts)
    if as_json:
        costs = [_cost(one, nodes.gpu_hour) for one in scales]
        lines = [
            asdict(one) | {"gpu_hours": one.gpu_hours, "cost": cost}
            for one, cost in zip(scales, costs, strict=True)
        ]
        print(json.dumps({"hardware": asdict(hardware), "scales": lines}, indent=2))
        return
    print(
        f"{hardware.gpus_per_node} x {hardware.gpu} a node, {nodes.link_gbit:,.0f} Gbit/s between "
        f"nodes; assumed: {nodes.utilization:.0%} of the peak, {LINK_SHARE:.0%} of the links\n"
    )
    print("\n".join(_table(scales, nodes.gpu_hour)))


def scales_of(config: RunConfig, hardware: Hardware, nodes: Sequence[int]) -> list[Scale]:
    """Raises ArtifactError without prepared pairs, ConfigError where a rank would get no pair."""
    prepared = prepared_work(config)
    if prepared is None:
        raise ArtifactError(
            f"{RunDir(config.run.dir).pairs_dir} does not exist",
            "prepared pairs, whose lengths decide how long a step takes",
            "Run `dpo-dist prepare` with the same config: it needs no GPU.",
        )
    found: list[Scale] = []
    for count in nodes:
        ranks = count * hardware.gpus_per_node
        places = count_places(ranks, config.train.sequence_parallel)
        if places > config.train.global_batch_size:
            raise ConfigError(
                f"--nodes {count}: {ranks} GPUs for train.global_batch_size "
                f"{config.train.global_batch_size}",
                "a pair of each step for every GPU",
                "Name fewer nodes, or raise train.global_batch_size.",
            )
        setup = make_setup(config, ranks)
        found.append(scale(setup, hardware, count, _work(config, prepared, places)))
    return found


def _work(config: RunConfig, prepared: PreparedWork, places: int) -> Work:
    """The micro-batches of the first steps as training makes them, and the rest in numbers."""
    train, settings = prepared.train, config.train
    shares, together = shares_prompts(config), train.together(config.data.order)
    size, seed = settings.global_batch_size, config.run.seed
    packed, shared = train.packed_lengths, train.shared if shares else None
    steps: list[list[list[Tokens]]] = []
    for step in prepared.first_steps:
        indices = step_pair_indices(step, len(packed), size, seed, together)
        plan = plan_micro_batches(packed, indices, places, settings.micro_batch_tokens, shared)
        steps.append(
            [
                [tokens_of(train, batch.pair_indices, shares) for batch in on_ranks]
                for on_ranks in zip(*plan, strict=True)
            ]
        )
    passed = () if config.objective.reference_free else (train, prepared.held_out)
    return Work(
        steps=steps,
        num_steps=prepared.num_steps,
        reference_tokens=sum(tokens_of(split, range(len(split)), shares)[0] for split in passed),
        second_forward=config.objective.second_forward is not None,
    )


def _cost(one: Scale, gpu_hour: float | None) -> float | None:
    return None if gpu_hour is None else gpu_hour * one.gpu_hours


def _table(scales: Sequence[Scale], gpu_hour: float | None) -> list[str]:
    head = (
        "nodes", "GPUs", "micro-batches", "tokens", "imbalance", "compute", "exchange", "step",
        "training", "reference", "GPU hours", *(["cost"] if gpu_hour is not None else []), "limit",
    )  # fmt: skip
    rows = [
        (
            f"{one.nodes}", f"{one.gpus}", f"{one.micro_batches:.1f}",
            f"{one.tokens_per_gpu:,.0f}", f"{one.imbalance:.1%}", f"{one.compute_s:.3g} s",
            f"{one.exchange_s:.3g} s", f"{one.step_s:.3g} s", duration(3600 * one.training_h),
            duration(3600 * one.reference_h), f"{one.gpu_hours:,.1f}",
            *([] if (cost := _cost(one, gpu_hour)) is None else [f"{cost:,.2f}"]),
            one.bottleneck,
        )
        for one in scales
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        )
        for row in (head, *rows)
    ]
