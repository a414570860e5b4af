"""Gradients in bfloat16: many micro-batches add up to what one makes, under every ZeRO stage."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_engine import start_engine

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding import zero
from dpo_dist.run.topology import from_environment

COUNT = 64  # micro-batches
ROWS = torch.randint(13, (COUNT, 5), generator=torch.Generator().manual_seed(7))
STEPS = {  # the micro-batches of a step, their rows
    "one": [ROWS],
    "many": [*ROWS.split(1)],
    "one, coherent": [ROWS[:1].expand(COUNT, -1)],
    "many, coherent": [ROWS[:1]] * COUNT,
}


def gradients() -> dict[str, list[list[float]]]:
    """The gradient of each step, by ZeRO stage; the weights stay what they were."""
    found: dict[str, list[list[float]]] = {}
    with collectives.process_group(from_environment()):
        for stage in range(4):
            for name, micro_batches in STEPS.items():
                engine = start_engine(stage, adapter=False, dtype="bfloat16")
                for number, rows in enumerate(micro_batches, start=1):
                    share = (
                        rows if len(rows) == 1 else rows[dist.get_rank() :: dist.get_world_size()]
                    )
                    scale = COUNT * dist.get_world_size() if len(rows) == 1 else COUNT
                    last = number == len(micro_batches)
                    loss = -engine(share) / scale
                    zero.backward(engine, loss, last=last, world_size=dist.get_world_size())
                found[f"{stage}, {name}"] = gradient_of(engine)
                engine.destroy()
    return found


def gradient_of(engine: Any) -> list[list[float]]:
    from deepspeed.utils import safe_get_full_grad

    own = engine.zero_optimization_stage() == 0
    parts = [p.grad if own else safe_get_full_grad(p) for p in engine.module.parameters()]
    return [part.double().flatten().tolist() for part in parts]


@pytest.mark.parametrize("ranks", [1, 2])
def test_truth_03_64_micro_batches_make_the_gradient_of_one(ranks: int) -> None:
    found = run_ranks(ranks, gradients)[0]
    for stage in range(4):
        for kind in ("", ", coherent"):
            one, many = (
                torch.cat([torch.tensor(part) for part in found[f"{stage}, {count}{kind}"]])
                for count in ("one", "many")
            )
            error = float((many - one).norm() / one.norm())
            shrunk = float(many.norm() / one.norm() - 1)
            print(f"stage {stage}{kind}: {error:.4%} apart, norm {shrunk:+.4%}")
            assert abs(shrunk) < 0.002 and error < 0.005, f"stage {stage}{kind}"
