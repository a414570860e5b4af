"""Tiled MLPs and offloaded inputs of layers: the numbers of a plain run, from fewer bytes."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, score_pairs
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.policy import PolicyParts, build_policy
from dpo_dist.engine.model.recompute import recompute_layers
from dpo_dist.engine.model.tiled_mlp import dense_mlps, tile_mlps
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.errors import ConfigError
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

    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            gradient: Any = deepspeed.utils.safe_get_full_grad(parameter)
            found[name] = gradient.clone()
    return found


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


def scored(policy: Any, tokens: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of a copy of the policy in tiles, and the gradients of their sum."""
    policy = copy.deepcopy(policy)
    tile_mlps(policy, tokens)
    scores = score_pairs(PairScorer(policy), pack_pairs(pairs_of(0, 2), CPU))
    scores.sum().backward()
    return scores.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


# What has no MLP of its own, hands it a second input, or has experts in every layer.
WITHOUT = {
    "mamba",
    "bloom",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "gpt_oss",
    "phimoe_longrope",
    "llama4",
}
PADDED = {"recurrent_gemma", "falcon_h1", "lfm2", "stablelm", "stablelm_dynamic"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_or_is_refused(family: str) -> None:
    policy = tiny_model(family)
    if family in WITHOUT:
        with pytest.raises(ConfigError, match=r"^train.tiled_mlp: 16 and \w+ has no MLP to tile;"):
            tile_mlps(policy, TILE)
        return
    layout: Layout = "padded" if family in PADDED else "packed"
    found = []
    for tokens in (None, TILE):
        tiled = copy.deepcopy(policy)
        tile_mlps(tiled, tokens)
        scores = score_pairs(PairScorer(tiled), pack_pairs(pairs_of(0, 2), CPU), layout)
        scores.sum().backward()
        found.append((scores, {n: p.grad for n, p in tiled.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_is_refused_says_why() -> None:
    with pytest.raises(ConfigError) as refused:
        tile_mlps(tiny_model("mixtral"), 512)
    assert str(refused.value) == (
        "train.tiled_mlp: 512 and MixtralForCausalLM has no MLP to tile; expected layers with a "
        "dense mlp, feed_forward, ffn or mlp_block, which takes hidden states alone. Remove "
        "train.tiled_mlp."
    )


def test_an_mlp_that_looks_at_other_tokens_is_refused() -> None:
    """As RWKV's, which mixes a token with the one before it."""

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden + nn.functional.pad(hidden, (0, 0, 1, -1)))

    policy: Any = tiny_model("llama")
    policy.model.layers[1].mlp = Mixing(policy.model.layers[1].mlp)
    with pytest.raises(ConfigError) as refused:
        tile_mlps(policy, TILE)
    first, _, rest = str(refused.value).partition("alone")
    assert first == "train.tiled_mlp: Mixing gives a token "
    assert rest.partition("else")[2] == (
        " than in a row; expected an MLP that looks at one token at a time. Remove train.tiled_mlp."
    )


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_row_of_one_tile_and_offload_are_equal_to_the_bit(
    with_adapter: bool, recomputes: bool
) -> None:
    policy: Any = tiny_model("llama").train()
    if with_adapter:
        policy = add_adapter(policy, AdapterSection.model_validate({"rank": 4}), "base").train()
    offloaded = copy.deepcopy(policy)
    if recomputes:
        recompute_layers(policy)
        recompute_layers(offloaded, offload=True)
    plain, tiled = scored(policy, None), scored(offloaded, 10_000)
    assert torch.equal(plain[0], tiled[0])
    assert plain[1].keys() == tiled[1].keys()
    assert all(torch.equal(plain[1][name], tiled[1][name]) for name in plain[1])


def test_backward_draws_the_dropout_of_the_forward() -> None:
    policy: Any = tiny_model("llama")
    settings = {"rank": 4, "dropout": 0.5, "target_modules": ["gate_proj", "down_proj"]}
    policy = add_adapter(policy, AdapterSection.model_validate(settings), "base").train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    mlp = dense_mlps(policy)[0]
    trained = [p for p in mlp.parameters() if p.requires_grad]
    hidden = torch.randn(1, 3 * TILE + 5, 32, requires_grad=True)
    torch.manual_seed(1)
    expected = torch.cat([mlp(tile) for tile in hidden.split(TILE, 1)], 1)
    weights, after = torch.randn_like(expected), torch.get_rng_state()
    by_hand = torch.autograd.grad((expected * weights).sum(), [hidden, *trained])
    tile_mlps(policy, TILE)
    torch.manual_seed(1)
    out = mlp(hidden)
    assert torch.equal(out, expected)
    torch.randn_like(expected)
    found = torch.autograd.grad((out * weights).sum(), [hidden, *trained])
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), after)


def test_in_bfloat16_many_tiles_are_as_exact_as_none() -> None:
    policy: Any = tiny_model("llama")
    exact, whole, tiled = (copy.deepcopy(policy).to(torch.bfloat16) for _ in range(3))
    exact = exact.double()
    tile_mlps(tiled, 64)
    torch.manual_seed(0)
    hidden, found = torch.randn(1, 4096, 32).bfloat16(), []
    for each in (exact, whole, tiled):
        mlp = dense_mlps(each)[0]
        (mlp(hidden.to(each.dtype)) / 64).sum().backward()  # a gradient that all tokens agree on
        found.append(mlp.down_proj.weight.grad.double())
    errors = [(gradient - found[0]).norm() / found[0].norm() for gradient in found[1:]]
    assert errors[1] <= 1.2 * errors[0]


def test_a_model_that_recomputes_in_its_own_way_is_not_offloaded() -> None:
    class OwnWay(nn.Module):
        def activation_checkpointing_enable(self, settings: Any) -> None: ...
        def enable_input_require_grads(self) -> None: ...

    with pytest.raises(ConfigError) as refused:
        recompute_layers(OwnWay(), offload=True)
    assert str(refused.value) == (
        "train.offload_activations: true and OwnWay recomputes its layers in a way of its own; "
        "expected a model whose layers are recomputed by transformers. Set it to false."
    )
