"""Gradients in bfloat16: many micro-batches add up to what one makes, under every ZeRO stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_engine import Scorer, TinyPolicy, start_engine

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


def exact_gradient(rows: torch.Tensor) -> torch.Tensor:
    """The gradient of the same weights in float64, flat."""
    torch.manual_seed(0)
    scorer = Scorer(TinyPolicy(False, 7, 1)).bfloat16().double()
    (-scorer(rows) / COUNT).backward()
    return torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


@pytest.mark.parametrize("ranks", [1, 2])
def test_truth_03_64_micro_batches_make_the_gradient_of_one(ranks: int) -> None:
    found = run_ranks(ranks, gradients)[0]
    for stage in range(4):
        for kind in ("", ", coherent"):
            one, many = (
                torch.cat([torch.tensor(part) for part in found[f"{stage}, {count}{kind}"]])
                for count in ("one", "many")
            )
            exact = exact_gradient(STEPS["one" + kind][0])
            of_one, of_many = (float((g - exact).norm() / exact.norm()) for g in (one, many))
            print(f"stage {stage}{kind}: one {of_one:.4%}, many {of_many:.4%} from the exact one")
            error = float((many - one).norm() / one.norm())
            shrunk = float(many.norm() / one.norm() - 1)
            print(f"stage {stage}{kind}: {error:.4%} apart, norm {shrunk:+.4%}")
            assert abs(shrunk) < 0.002 and error < (0.002 if kind else 0.005), (
                f"stage {stage}{kind}"
            )
            # the rest is what bfloat16 takes from any gradient; ZeRO-0 and 1 round the sum too
            assert of_many < of_one * (1.1 if stage >= 2 else 1.7), f"stage {stage}{kind}"


REDUCTIONS = ("all_reduce", "reduce")


def reduced_types() -> dict[str, list[str]]:
    """By ZeRO stage, the types of what ranks add up during the last backward of a step."""
    found: dict[str, list[str]] = {}
    with collectives.process_group(from_environment()), pytest.MonkeyPatch.context() as patch:
        for stage in range(4):
            engine = start_engine(stage, adapter=False, dtype="bfloat16")
            types: set[str] = set()
            from deepspeed.comm.torch import TorchBackend

            with patch.context() as watched:
                scatter = TorchBackend.reduce_scatter_tensor  # holds the function of its start
                watched.setattr(TorchBackend, "reduce_scatter_tensor", noting(scatter, types))
                for name in REDUCTIONS:
                    watched.setattr(dist, name, noting(getattr(dist, name), types))
                loss = -engine(ROWS[dist.get_rank() :: 2]) / COUNT
                zero.backward(engine, loss, last=True, world_size=2)
                zero.update(engine)
            found[str(stage)] = sorted(types)
            engine.destroy()
    return found


def noting(reduction: Callable[..., Any], types: set[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value.is_floating_point():
                types.add(str(value.dtype))
        return reduction(*args, **kwargs)

    return noted


def test_truth_03_ranks_add_up_in_float32() -> None:
    assert run_ranks(2, reduced_types)[0] == dict.fromkeys("0123", ["torch.float32"])
