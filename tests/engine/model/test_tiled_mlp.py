"""Tiled MLPs and offloaded inputs of layers: the numbers of a plain run, from fewer bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.model.policy import PolicyParts, build_policy
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.run.topology import from_environment

CPU = torch.device("cpu")
TILE = 16
# (ZeRO stage, with an adapter, gradient checkpointing)
Case = tuple[int, bool, bool]
FEW: list[Case] = [(2, True, True), (3, False, True), (3, True, False)]
CASES: list[Case] = [(s, a, c) for s in (0, 1, 2, 3) for a in (False, True) for c in (False, True)]
BOTH = {"tiled_mlp": TILE, "offload_activations": True}


def pairs_of(rank: int, count: int) -> list[PairIds]:
    """Rows of different lengths on each rank, hence of different numbers of tiles."""
    rng = random.Random(100 * rank + count)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, 128) for _ in range(length)]

    return [(ids(9 + 30 * rank), ids(11), ids(8 + pair)) for pair in range(count)]


def start(model_dir: str, case: Case, **settings: Any) -> Any:
    stage, with_adapter, recomputes = case
    if not recomputes:
        settings.pop("offload_activations", None)
    train = TrainSection.model_validate(
        {"learning_rate": 1e-3, "warmup_ratio": 0, "deepspeed": f"zero{stage}", "max_grad_norm": 0}
        | {"gradient_checkpointing": recomputes, **settings}
    )
    sharding = ds_config.training_config(train, "float32", from_environment().world_size)
    if stage == 3:  # else a tiny model's parameters stay whole
        sharding["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = ModelSection.model_validate({"path": model_dir, "dtype": "float32"})
    adapter = AdapterSection.model_validate({"rank": 4}) if with_adapter else None
    parts = PolicyParts(Path(model_dir), model, adapter)
    return build_policy(parts, train, sharding, num_steps=10, device=CPU, seed=3)[0]


def gradients(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    return {
        name: deepspeed.utils.safe_get_full_grad(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def steps(engine: Any) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses and gradient norms of two steps of two micro-batches, and their gradients."""
    ranks, rank = from_environment().world_size, from_environment().rank
    numbers, found = [], []
    for step in range(2):
        for index, count in enumerate((1 + rank + step, 2)):
            scores = score_pairs(engine, pack_pairs(pairs_of(rank, count), CPU))
            loss = -nn.functional.logsigmoid(0.3 * (scores[:, 0] - scores[:, 1])).sum()
            zero.backward(engine, loss, last=index == 1, world_size=ranks)
            numbers.append(float(loss))
        if engine.zero_optimization_stage():
            found.append(gradients(engine))
        else:
            named = engine.module.named_parameters()
            found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        numbers.append(zero.update(engine).grad_norm)
    return numbers, found


def compared(model_dir: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case the numbers of a plain run and of one with both keys, and what is apart."""
    seen: list[dict[str, Any]] = []
    with collectives.process_group(from_environment()):
        for case in cases:
            plain, tiled = [], []
            for settings, into in (({}, plain), (BOTH, tiled)):
                engine = start(model_dir, tuple(case), **settings)  # pyright: ignore
                into += steps(engine)
                zero.take_down(engine)
            apart = [
                float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-6))
                for one, other in zip(plain[1], tiled[1], strict=True)
                for name in one
            ]
            seen.append({"plain": plain[0], "tiled": tiled[0], "apart": max(apart)})
    return seen


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "cases",
    [pytest.param(FEW, id="few"), pytest.param(CASES, id="all", marks=pytest.mark.slow)],
)
def test_ranks_train_as_without_tiles_and_offload(model_dir: str, cases: list[Case]) -> None:
    """Losses, gradients and norms, although the ranks have different numbers of tiles."""
    for on_rank in run_ranks(2, compared, model_dir, cases, timeout_s=400):
        for case, seen in zip(cases, on_rank, strict=True):
            assert seen["tiled"] == pytest.approx(seen["plain"], rel=1e-5, abs=1e-6), case
            assert seen["apart"] < 1e-5, case
