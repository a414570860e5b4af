"""A row that ranks share against the same row on one: every column, every gradient."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from support.oracles.plain_forward import adapted, pairs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import Team, join_team
from dpo_dist.engine.forward.packing import PackedPairs, PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, score_pairs
from dpo_dist.objective.pair_logps import COMPLETIONS, Terms
from dpo_dist.run.topology import from_environment

ROUTERS = Terms(num_experts=4)
EVERYTHING = Terms(ld_alpha=0.5, unweighted=True, prompt=True, sum_sq=True)
# family, layout, terms, with gradient checkpointing; a model has 4 heads and 2 key-value heads
CASES: dict[str, tuple[str, Layout, Terms, bool]] = {
    "every column": ("llama", "packed", EVERYTHING, False),
    "recomputed": ("llama_tied", "packed", COMPLETIONS, True),
    "adapter": ("adapter", "packed", COMPLETIONS, True),
    "window and soft caps": ("gemma2", "packed", COMPLETIONS, False),
    "window in the mask alone": ("qwen2_moe", "packed", ROUTERS, False),
    "sinks": ("gpt_oss", "packed", COMPLETIONS, True),
    "routers": ("mixtral", "packed", ROUTERS, False),
    "learned positions": ("gpt2", "packed", COMPLETIONS, False),
    "frequencies by length": ("phi3_longrope", "packed", COMPLETIONS, False),
    "padded": ("llama", "padded", EVERYTHING, False),
    "padded routers": ("mixtral", "padded", ROUTERS, False),
    "padded frequencies": ("phi3_longrope", "padded", COMPLETIONS, False),
    "state space": ("mamba", "padded", COMPLETIONS, False),
}
SINGLE: list[PairIds] = [([5], [6], [7])]  # fewer tokens and sequences than ranks
LONG: list[PairIds] = [(list(range(3, 68)), [5, 6, 7], [8, 9]), ([3, 4], [9], [7, 7])]


def rows_of(scorer: PairScorer) -> list[list[PairIds]]:
    """Pairs alone, and where the model lets them several of one prompt."""
    shared = [([9, 8, 7, 6], [5, 4], [3]), ([9, 8, 7, 6], [3], [4, 4, 4]), *pairs()]
    return [SINGLE, LONG, pairs() if scorer.shares_prompts else pairs()[:2], shared]


def policy_of(case: str) -> Any:
    family, _, _, recomputes = CASES[case]
    policy: Any = adapted() if family == "adapter" else tiny_model(family)
    if recomputes:
        policy.activation_checkpointing_enable({"use_reentrant": True})
        policy.enable_input_require_grads()
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return policy.train()


def scored(scorer: PairScorer, packed: PackedPairs) -> tuple[Tensor, dict[str, Tensor]]:
    """Columns, and gradients of a sum that weighs each of them differently."""
    scorer.zero_grad()
    columns = score_pairs(scorer, packed)
    (columns * torch.arange(1.0, columns.numel() + 1).view_as(columns) / 10).sum().backward()
    return columns.detach(), {
        name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None
    }


def differences(case: str, team: Team) -> dict[str, float]:
    """The largest between the team and one rank, relative where numbers exceed 1."""
    _, layout, terms, _ = CASES[case]
    policy, found = policy_of(case), {"columns": 0.0, "gradients": 0.0}
    alone = PairScorer(copy.deepcopy(policy), layout=layout)
    together = PairScorer(policy, layout=layout, team=team)
    for rows in rows_of(alone):
        packed = pack_pairs(rows, terms=terms, shared=alone.shares_prompts)
        expected, gradients = scored(alone, packed)
        columns, parts = scored(together, packed)
        assert parts.keys() == gradients.keys() and gradients
        found["columns"] = max(found["columns"], apart(columns, expected))
        for name, gradient in gradients.items():
            dist.all_reduce(parts[name])
            found["gradients"] = max(found["gradients"], apart(parts[name], gradient))
    return found


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def on_ranks(size: int, cases: list[str]) -> dict[str, Any]:
    with collectives.process_group(from_environment()):
        team = join_team(size)
        assert team is not None and team.size == size
        return {case: differences(case, team) for case in cases}


def check(num_ranks: int, cases: list[str]) -> None:
    for result in run_ranks(num_ranks, on_ranks, num_ranks, cases, timeout_s=240):
        worst = {(case, what): d for case in cases for what, d in result[case].items() if d > 1e-5}
        assert result.keys() == set(cases) and not worst


def test_two_ranks_equal_one() -> None:
    check(2, list(CASES))


def test_four_ranks_with_two_key_value_heads_equal_one() -> None:
    check(4, ["every column", "sinks", "window in the mask alone", "padded", "state space"])
