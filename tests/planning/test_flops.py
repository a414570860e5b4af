"""The FLOPs of a step against those that torch counts, and the peaks of devices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.planner_setups import LLAMA_8B
from support.ranks import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.forward.packing import PackedPairs, pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.model_shape import shape_of
from dpo_dist.engine.model.tiled_mlp import tile_mlps
from dpo_dist.planning.flops import (
    PEAKS,
    Flops,
    flops_per_token,
    peak_flops,
    step_flops,
    utilization,
)

DOCS = ROOT / "docs/planning.md"
GEMMS = {torch.ops.aten.mm, torch.ops.aten.addmm_}  # bmm and attention are scores and rotations


def test_flops_of_a_token() -> None:
    n = LLAMA_8B.num_active
    assert flops_per_token(LLAMA_8B, checkpointing=False) == Flops(2 * n, 4 * n, 0)
    assert flops_per_token(LLAMA_8B, checkpointing=True) == Flops(2 * n, 4 * n, 2 * n)
    adapted = replace(LLAMA_8B, num_trained=1000)
    assert flops_per_token(adapted, checkpointing=False) == Flops(2 * n, 2 * n + 2000, 0)


def test_what_is_recomputed_is_no_work_of_the_model() -> None:
    flops = Flops(forward=2, backward=4, recomputed=3)
    assert (flops.model, flops.hardware) == (6, 9)


def packed_pairs() -> PackedPairs:
    chance = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 512, (count,), generator=chance).tolist()

    return pack_pairs([(ids(40), ids(9), ids(17)), (ids(5), ids(30), ids(12))])


def flops_of_addmm_(total: Any, left: Any, right: Any, **_: Any) -> int:
    """Of the head's gradient; torch counts `addmm` alone."""
    return 2 * left[0] * left[1] * right[1]


def counted_flops(policy: Any, packed: PackedPairs) -> tuple[int, int]:
    """FLOPs of matrix products in (forward, backward) of a micro-batch."""
    scorer = PairScorer(policy)
    forward, backward = (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops_of_addmm_})
        for _ in range(2)
    )
    with forward:
        loss = scorer(packed).sum()
    with backward:
        loss.backward()
    counts = (mode.get_flop_counts()["Global"] for mode in (forward, backward))
    before, after = (sum(n for op, n in ops.items() if op in GEMMS) for ops in counts)
    return before, after


@pytest.mark.parametrize(
    ("checkpointing", "adapter", "tied", "tile"),
    [
        (False, False, False, None),
        (True, False, False, None),
        (True, False, True, None),
        (False, True, False, None),
        (True, True, True, None),
        (False, False, False, 64),
        (True, False, False, 64),
    ],
)
def test_flops_of_a_step_are_those_that_torch_counts(
    checkpointing: bool, adapter: bool, tied: bool, tile: int | None
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    policy: Any = AutoModelForCausalLM.from_config(config)
    if adapter:
        policy = add_adapter(policy, AdapterSection.model_validate({"rank": 4}), "base")
    tile_mlps(policy, tile)
    policy.enable_input_require_grads()  # as in training, so that every layer has a backward
    if checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": True})
    policy.train()
    packed = packed_pairs()
    forward, backward = counted_flops(policy, packed)
    shape, num_scored = shape_of(policy), len(packed.targets)
    flops = step_flops(
        shape, packed.num_tokens, num_scored,
        checkpointing=checkpointing, tiled_mlp=tile is not None,
    )  # fmt: skip
    assert num_scored < packed.num_tokens
    assert forward == flops.forward
    assert backward == flops.backward + flops.recomputed


def test_a_second_forward_is_recomputation() -> None:
    plain = step_flops(LLAMA_8B, 1000, 400, checkpointing=True)
    ahead = step_flops(LLAMA_8B, 1000, 400, checkpointing=True, second_forward=True)
    assert ahead == replace(plain, recomputed=2 * plain.forward)


def test_a_step_of_scored_tokens_is_that_many_tokens() -> None:
    token = flops_per_token(LLAMA_8B, checkpointing=True)
    step = step_flops(LLAMA_8B, 7, 7, checkpointing=True)
    assert step == Flops(7 * token.forward, 7 * token.backward, 7 * token.recomputed)


def test_utilization() -> None:
    """10 steps of 6e15 FLOPs in 30 s are 2e15 FLOPs per second, of 8 devices of 1e15."""
    assert utilization(10 * 6e15, seconds=30, peak_flops=1e15, num_devices=8) == 0.25


def test_the_example_of_the_docs() -> None:
    step = step_flops(LLAMA_8B, 131_072, 65_536, checkpointing=True)
    model, hardware = (utilization(n, 2, 989e12, 8) for n in (step.model, step.hardware))
    text = " ".join(DOCS.read_text().split())
    assert f"{step.model / 1e15:.2f} PFLOP per step, {step.hardware / 1e15:.2f} with" in text
    assert f"= {model:.0%}, the HFU {hardware:.0%}.".replace("%", " %") in text


def test_the_docs_have_every_peak() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    for name, peak, _ in PEAKS:
        gpu = name.split()[0] if "4090" not in name else name
        numbers = next(line for line in rows if line.startswith(f"| {gpu} ")).split("|")[2]
        assert f"{peak / 1e12:,.0f}" in numbers.strip().split("; "), name


@pytest.mark.parametrize(
    ("device", "bfloat16", "float16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 989e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12),
        ("NVIDIA H100 NVL", 835e12, 835e12),
        ("NVIDIA H200", 989e12, 989e12),
        ("NVIDIA H200 NVL", 835e12, 835e12),
        ("NVIDIA B200", 2.25e15, 2.25e15),
        ("NVIDIA L40S", 362e12, 362e12),
        ("NVIDIA A10", 125e12, 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 165e12),
        ("Tesla V100-SXM2-32GB", None, 125e12),
        ("Tesla V100-PCIE-16GB", None, 112e12),
        ("Tesla T4", None, 65e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
        ("cpu", None, None),
        ("", None, None),
    ],
)
def test_peaks_of_devices(device: str, bfloat16: float | None, float16: float | None) -> None:
    assert peak_flops(device, "bfloat16") == bfloat16
    assert peak_flops(device, "float16") == float16
    assert peak_flops(device, "float32") is None
