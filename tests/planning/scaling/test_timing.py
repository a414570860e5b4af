"""Times on 1, 2, 4, ... nodes: their arithmetic, what limits them, and a published job."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import dpo_dist, succeed
from support.planner_setups import LLAMA_8B, setup_of
from support.tiny_run import WORDS, make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ConfigError
from dpo_dist.inputs.work import prepared_work, tokens_of
from dpo_dist.planning.flops import PEAKS, step_flops
from dpo_dist.planning.scaling.hardware import LINKS_INSIDE, Hardware, hardware_of
from dpo_dist.planning.scaling.timing import Scale, Tokens, Work, scale

ZERO3 = {"zero_optimization": {"stage": 3, "overlap_comm": True}}
NODES = Hardware("H100", 2, flops=4e14, inside=1e12, between=1e12)
PAIR: Tokens = (1000, 600)


def work(micro_batch: list[Tokens], count: int = 2, **changes: Any) -> Work:
    """Steps of `count` such micro-batches, one part a rank."""
    return Work(
        **{"steps": [[micro_batch] * count], "num_steps": 90, "reference_tokens": 0} | changes
    )


def times(hardware: Hardware, nodes: int, found: Work, config: Any = ZERO3) -> Scale:
    ranks = nodes * hardware.gpus_per_node
    return scale(setup_of(LLAMA_8B, config, "bfloat16", ranks), hardware, nodes, found)


def test_a_step_is_its_micro_batches_on_the_fullest_rank() -> None:
    found = times(NODES, 1, work([PAIR, (3000, 1000)]))
    flops = step_flops(LLAMA_8B, 3000, 1000, checkpointing=True).hardware
    assert found.step_s == found.compute_s == pytest.approx(2 * flops / 4e14)
    assert found.training_h == pytest.approx(90 * found.step_s / 3600)
    assert (found.gpus, found.micro_batches, found.tokens_per_gpu) == (2, 2, 2000)
    assert found.imbalance == 0.5 and found.bottleneck == "few pairs a GPU"
    coupled = times(NODES, 1, work([PAIR, (3000, 1000)], second_forward=True))
    assert coupled.compute_s > 1.2 * found.compute_s


def test_the_longer_of_computing_and_exchanging_counts_or_their_sum() -> None:
    even = [PAIR] * 4
    fast = times(NODES, 2, work(even))
    assert fast.bottleneck == "compute" and fast.exchange_s < fast.step_s == fast.compute_s
    # all parameters for the forward, those over a billion again, gradients in float32; a ring of 4
    moved = 2 * 8_030_261_248 + 2 * 7_030_261_248 + 4 * 8_030_261_248
    slow = times(replace(NODES, between=1e9), 2, work(even))
    assert slow.exchange_s == pytest.approx(2 * 0.75 * moved / 1e9)
    assert slow.step_s == slow.exchange_s and slow.bottleneck == "links between nodes"
    inside = times(replace(NODES, inside=1e9), 1, work([PAIR] * 2))
    assert inside.bottleneck == "links inside nodes"
    alone = {"zero_optimization": {"stage": 3}}
    summed = times(replace(NODES, between=1e9), 2, work(even), alone)
    assert summed.step_s == pytest.approx(summed.compute_s + summed.exchange_s)


def test_what_follows_the_last_micro_batch_is_not_overlapped() -> None:
    zero2 = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    found = times(NODES, 1, work([PAIR] * 2), zero2)
    update = 0.5 * 2 * 8_030_261_248 / 1e12  # the other half of the parameters
    assert found.step_s == pytest.approx(found.compute_s + update)


def test_ranks_that_share_a_row_compute_a_part_of_it_and_wait_for_each_other() -> None:
    alone = {"zero_optimization": {"stage": 0}}
    setup = setup_of(LLAMA_8B, alone, "bfloat16", 4)
    one, two, four = (
        scale(replace(setup, ranks_per_row=ranks), NODES, 2, work([PAIR] * (4 // ranks)))
        for ranks in (1, 2, 4)
    )
    assert two.compute_s == pytest.approx(one.compute_s / 2)
    assert (two.tokens_per_gpu, four.tokens_per_gpu) == (500, 250)
    # forward, backward and forward again of 32 layers: q, k, v and what attention makes of them
    sent = 3 * 32 * 2 * 2 * (4096 + 1024) * 1000
    assert two.exchange_s - one.exchange_s == pytest.approx(2 * sent / 4 / 1e12)
    # four ranks on two nodes: of the three that a rank sends to, two are on the other one
    between = 2 * (sent / 4 * 3 / 4) * 2 / 3
    assert four.exchange_s - one.exchange_s == pytest.approx(2 * between / 1e12)


def test_the_reference_pass_needs_no_exchange() -> None:
    found = times(NODES, 1, work([PAIR] * 2, reference_tokens=10**9))
    assert found.reference_h == pytest.approx(2 * 7_504_658_432 * 10**9 / (2 * 4e14) / 3600)
    assert found.gpu_hours == pytest.approx(2 * (found.training_h + found.reference_h))


def test_every_gpu_with_a_peak_has_a_link_and_others_are_refused() -> None:
    assert {name for name, *_ in PEAKS} == LINKS_INSIDE.keys()
    found = hardware_of("h100", "bfloat16", 8, 3200, 0.4)
    assert (found.flops, found.inside, found.between) == (0.4 * 989e12, 0.8 * 450e9, 0.8 * 400e9)
    with pytest.raises(ConfigError) as caught:
        hardware_of("T4", "bfloat16", 8, 100, 0.4)
    assert str(caught.value) == (
        "--gpu T4, of which the peak in bfloat16 is not known; expected one of A100, H100 PCIE, "
        "H100 NVL, H100, H200 NVL, H200, B200, L40S, A10, RTX 4090. Name one of them, or set "
        "model.dtype to bfloat16."
    )


def test_a_published_job_is_met() -> None:
    """Llama 3.1 8B on UltraFeedback, 8 H100, packed with shared prompts: 6.65 pairs/s a GPU.

    300 rows of it have 1,067 tokens a pair on average, 647 of them scored.
    """
    hardware = hardware_of("H100", "bfloat16", 8, 3200, 0.4)
    found = times(hardware, 1, work([(8 * 1067, 8 * 647)] * 8))
    assert 2 * 8 / found.step_s == pytest.approx(6.65, rel=0.25)


def test_the_command(tmp_path: Path) -> None:
    run_yaml = make_run(tmp_path)
    settings = "model.dtype=bfloat16", "--gpus-per-node", "2", "--link-gbit", "100"
    early = dpo_dist("plan", run_yaml, "--nodes", "1,2", *settings)
    assert early.returncode == 2 and "whose lengths decide how long a step takes" in early.stderr
    succeed("prepare", run_yaml)
    shown = succeed("plan", run_yaml, "--nodes", "1,2,4", "--gpu-hour", "2", *settings).stdout
    head, *rows = shown.splitlines()[2:]
    assert head.split("  ")[0] == "nodes" and "cost" in head and len(rows) == 3
    assert [row.split()[:2] for row in rows] == [["1", "2"], ["2", "4"], ["4", "8"]]
    told = json.loads(succeed("plan", run_yaml, "--nodes", "1", "--json", *settings).stdout)
    (one,) = told["scales"]
    assert one["gpus"] == 2 and one["cost"] is None and one["step_s"] > 0
    for nodes, words in (
        ("8", "--nodes 8: 16 GPUs for train.global_batch_size 8; expected a pair of each step"),
        ("0", "--nodes 0; expected numbers from 1 to 64, as in 1,2,4. Correct it."),
        ("1,x", "--nodes 1,x; expected numbers"),
    ):
        refused = dpo_dist("plan", run_yaml, "--nodes", nodes, *settings)
        assert refused.returncode == 2 and words in refused.stderr
    for options, words in (
        (
            ("--gpu", "A100"),
            "--gpu without --nodes; expected --nodes 1,2,4 with it. Add it, or leave the rest out.",
        ),
        (
            ("--nodes", "1", "--world-size", "2"),
            "--world-size with --nodes; expected --nodes, or a run's own ranks.",
        ),
    ):
        refused = dpo_dist("plan", run_yaml, *options)
        assert refused.returncode == 2 and words in refused.stderr


def test_what_pairs_share_is_planned_once(tmp_path: Path) -> None:
    run_yaml = make_run(tmp_path)
    rows = [
        {
            "prompt": f"{word} " * 6,
            "responses": [f"{other} " * 3 for other in WORDS[:4]],
            "scores": [4, 3, 2, 1],
        }
        for word in WORDS[:9]
    ]
    for split, part in (("train", rows[:8]), ("eval", rows[8:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    pairs = [f"data.{split}.0.pairs=all" for split in ("train", "eval")]
    settings = *pairs, "train.global_batch_size=12", "train.num_epochs=1"
    succeed("prepare", run_yaml, *settings)
    asked = "--nodes", "1", "--gpu", "H100", "--gpus-per-node", "1", "--json"
    tokens = {}
    for order in ("pairs", "prompts"):
        asked_for = *asked, *settings, "model.dtype=bfloat16", f"data.order={order}"
        (one,) = json.loads(succeed("plan", run_yaml, *asked_for).stdout)["scales"]
        tokens[order] = one["tokens_per_gpu"] * one["micro_batches"]
    work = prepared_work(load_config(run_yaml, list(settings)))
    assert work is not None and work.train.shared is not None and work.num_steps == 4
    (alone, _), (once, scored) = (
        tokens_of(work.train, range(48), shares) for shares in (False, True)
    )
    assert tokens["prompts"] == once / 4 < tokens["pairs"] < alone / 4
    # six pairs of a prompt have it six times, and each of four answers three times
    assert alone - once == 5 * (once - scored) + 2 * scored
    held_out, _ = tokens_of(work.held_out, range(len(work.held_out)), True)
    assert len(work.held_out) == 6
    told = succeed("plan", run_yaml, *settings).stdout
    assert f" x {once + held_out:,} tokens, every prompt and answer once" in told
