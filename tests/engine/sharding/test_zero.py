"""The gradient norm that is logged, under every ZeRO stage, number of ranks and type."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny_engine import GLOBAL_BATCH, start_engine

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding import zero
from dpo_dist.run.topology import from_environment

CASES = [f"{stage}-{dtype}" for dtype, stage in product(("float32", "bfloat16"), range(4))]


def norms() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with collectives.process_group(from_environment()):
        for case in CASES:
            stage, dtype = case.split("-")
            engine = start_engine(int(stage), adapter=False, dtype=dtype)
            found[case] = [norm_of(engine, step) for step in (1, 2)]
            engine.destroy()
    return found


def norm_of(engine: object, step: int) -> float:
    rows = torch.randint(13, (GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(step))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loss = -engine(rows[rank::world_size]) / GLOBAL_BATCH  # type: ignore[operator]
    zero.backward(engine, loss, last=True, world_size=world_size)
    return zero.update(engine)[0]


def test_the_gradient_norm_is_the_same_whatever_stage_ranks_and_type() -> None:
    one, two = (run_ranks(ranks, norms)[0] for ranks in (1, 2))
    expected = one["0-float32"]
    assert min(expected) > 1.0, "clipped"
    for case, measured in (one | {f"{case}, two ranks": two[case] for case in CASES}).items():
        loose = 0.05 if "bfloat16" in case else 1e-5
        assert measured == pytest.approx(expected, rel=loose), case
