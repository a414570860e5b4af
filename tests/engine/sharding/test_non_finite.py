"""A gradient that is not finite on one rank: no rank updates, and the schedule goes on."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_engine import full_weights, start_engine, train_step

from dpo_dist.engine.distributed import collectives
from dpo_dist.run.topology import from_environment

CASES = [f"{stage}-{dtype}" for dtype, stage in product(("float32", "bfloat16"), range(4))]
BAD_STEP = 2


def poisoned() -> dict[str, dict[str, Any]]:
    """Three steps, the gradient of the second NaN on the last rank only."""
    found: dict[str, dict[str, Any]] = {}
    with collectives.process_group(from_environment()):
        for case in CASES:
            stage, dtype = case.split("-")
            engine = start_engine(int(stage), adapter=False, dtype=dtype)
            states, rates = [], []
            for step in (1, BAD_STEP, 3):
                if step == BAD_STEP and dist.get_rank() == dist.get_world_size() - 1:
                    hook = engine.module.policy.scale.register_hook(lambda g: g * torch.nan)
                rates.append(engine.optimizer.param_groups[0]["lr"])
                train_step(engine, step)
                states.append(everything(engine))
                if step == BAD_STEP and dist.get_rank() == dist.get_world_size() - 1:
                    hook.remove()
            found[case] = {"states": states, "rates": rates}
            engine.destroy()
    return found


def everything(engine: Any) -> list[float]:
    """Sums of the weights, and of this rank's share of the optimizer's state."""
    weights, masters = full_weights(engine)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [*weights.values(), *masters.values(), *map(torch.as_tensor, moments)]
    return [float(tensor.double().sum()) for tensor in tensors]


@pytest.mark.fault(31, "NaN and inf in gradients of every ZeRO stage", becomes="no update")
@pytest.mark.parametrize("ranks", [1, 2])
def test_truth_01_no_update_with_a_gradient_that_is_not_finite(ranks: int) -> None:
    for seen in run_ranks(ranks, poisoned):
        for case in CASES:
            before, after, later = seen[case]["states"]
            assert torch.tensor(later).isfinite().all(), case
            assert before == after, f"{case}: weights or optimizer state moved"
            assert after != later, f"{case}: training does not go on"
            assert seen[case]["rates"] == pytest.approx([1e-2, 8e-3, 6.4e-3]), case
