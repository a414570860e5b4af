"""How long a step, the reference pass and the run take on a number of nodes, and what limits them.

A step is its micro-batches, one after the other on all ranks at once, and the update. A
micro-batch takes the longer of computing and exchanging where DeepSpeed overlaps them, else their
sum. Starts, evaluations, checkpoints and the export are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_dist.planning.flops import step_flops
from dpo_dist.planning.scaling.hardware import Hardware
from dpo_dist.planning.scaling.traffic import Traffic, traffic_of
from dpo_dist.planning.setup import Setup

COMPUTE, INSIDE, BETWEEN = "compute", "links inside nodes", "links between nodes"
TOO_FEW = "few pairs a GPU"  # of global_batch_size: the fullest GPU keeps the others waiting
UNEVEN = 0.1  # imbalance from which that is said
Tokens = tuple[int, int]  # of a micro-batch: packed, and scored


@dataclass(frozen=True)
class Work:
    """What a run has to do, on one number of nodes."""

    steps: Sequence[Sequence[Sequence[Tokens]]]  # some steps: [step][micro-batch][rank]
    num_steps: int  # of the run
    reference_tokens: int  # 0 without a reference pass
    second_forward: bool = False


@dataclass(frozen=True)
class Scale:
    """A run on so many nodes; seconds are means over the steps that were looked at."""

    nodes: int
    gpus: int
    micro_batches: float  # a step, on each rank
    tokens_per_gpu: float  # of a micro-batch
    imbalance: float  # what the fullest rank of a micro-batch has more than the mean
    compute_s: float  # of a step
    exchange_s: float  # of a step, overlapped or not
    step_s: float
    bottleneck: str
    training_h: float
    reference_h: float

    @property
    def gpu_hours(self) -> float:
        return self.gpus * (self.training_h + self.reference_h)


def scale(setup: Setup, hardware: Hardware, nodes: int, work: Work) -> Scale:
    """The run on `nodes`; `setup.world_size` is their number of GPUs."""
    shape, traffic = setup.shape, traffic_of(setup)
    inside, between = _micro_batch_seconds(traffic, hardware, nodes)
    exchange, compute_s, exchange_s, step_s = max(inside, between), 0.0, 0.0, 0.0
    tokens = fullest = count = 0
    for step in work.steps:
        for ranks in step:
            flops = max(
                step_flops(
                    shape, *one, checkpointing=setup.checkpointing,
                    second_forward=work.second_forward, tiled_mlp=setup.tiled,
                ).hardware
                for one in ranks
            )  # fmt: skip
            compute = flops / setup.ranks_per_row / hardware.flops
            compute_s += compute
            shared = _all_to_all_seconds(setup, hardware, max(packed for packed, _ in ranks), work)
            exchange_s += exchange + shared
            overlaps = setup.sharding.overlaps
            step_s += shared + (max(compute, exchange) if overlaps else compute + exchange)
            tokens += sum(packed for packed, _ in ranks)
            fullest += len(ranks) * max(packed for packed, _ in ranks)
            count += 1
        update = _update_seconds(traffic, hardware, nodes)
        exchange_s, step_s = exchange_s + update, step_s + update
    seen, gpus, imbalance = len(work.steps), setup.world_size, fullest / tokens - 1
    if compute_s >= exchange_s:
        limit = TOO_FEW if imbalance > UNEVEN else COMPUTE
    else:
        limit = BETWEEN if between > inside else INSIDE
    rate = gpus * hardware.flops / (2 * shape.num_active)  # tokens forward, a second
    return Scale(
        nodes=nodes,
        gpus=gpus,
        micro_batches=count / seen,
        tokens_per_gpu=tokens / count / gpus,
        imbalance=imbalance,
        compute_s=compute_s / seen,
        exchange_s=exchange_s / seen,
        step_s=step_s / seen,
        bottleneck=limit,
        training_h=work.num_steps * step_s / seen / 3600,
        reference_h=work.reference_tokens / rate / 3600,
    )


def _micro_batch_seconds(traffic: Traffic, hardware: Hardware, nodes: int) -> tuple[float, float]:
    """Inside nodes and between them."""
    moved = traffic.gathered + traffic.scattered + 2 * traffic.reduced
    inside, between = hardware.seconds(moved, nodes)
    return inside + hardware.seconds(traffic.gathered_inside, 1)[0], between


def _all_to_all_seconds(setup: Setup, hardware: Hardware, tokens: int, work: Work) -> float:
    """What attention waits for where ranks share rows: nothing overlaps with it.

    A team of more ranks than a node has sends to the other nodes through the node's link.
    """
    shared, inside = setup.ranks_per_row, hardware.gpus_per_node
    if shared == 1:
        return 0.0
    sent = setup.exchanged_bytes(tokens, 1 + work.second_forward)
    outside = sent * max(0, shared - inside) / (shared - 1)
    return max((sent - outside) / hardware.inside, outside * inside / hardware.between)


def _update_seconds(traffic: Traffic, hardware: Hardware, nodes: int) -> float:
    return max(hardware.seconds(2 * traffic.reduced_once + traffic.updated, nodes))
