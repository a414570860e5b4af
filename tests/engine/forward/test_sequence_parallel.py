"""A row that ranks share against the same row on one: every column, every gradient."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.oracles.plain_forward import adapted, pairs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import Team, join_team
from dpo_dist.engine.forward.layout_choice import settle
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
QUICK = ["every column", "adapter", "window and soft caps", "sinks", "padded"]
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
    worst: dict[str, float] = {}
    for result in run_ranks(num_ranks, on_ranks, num_ranks, cases, timeout_s=240):
        assert result.keys() == set(cases)
        for found in result.values():
            worst = {what: max(away, worst.get(what, 0)) for what, away in found.items()}
    print(num_ranks, worst)
    assert worst["columns"] <= 1e-5 and worst["gradients"] <= 1e-5, worst


def test_two_ranks_equal_one() -> None:
    check(2, QUICK)


@pytest.mark.slow
def test_two_ranks_equal_one_in_every_case() -> None:
    check(2, [case for case in CASES if case not in QUICK])


@pytest.mark.slow
def test_four_ranks_with_two_key_value_heads_equal_one() -> None:
    check(4, [case for case in CASES if case != "learned positions"])  # of 4 heads each has one


def settled_on_ranks(family: str, size: int, dtype: str) -> dict[str, Any]:
    with collectives.process_group(from_environment()):
        scorer = PairScorer(tiny_model(family, dtype=getattr(torch, dtype)), team=join_team(size))
        return settle(scorer).found


def test_the_self_check_scores_as_the_team_does() -> None:
    """In a layout that the model can have; heads that ranks cannot share leave the padded one."""
    for result in run_ranks(2, settled_on_ranks, "gemma2", 2, "bfloat16"):
        assert result["layout"] == "packed"
    for result in run_ranks(3, settled_on_ranks, "llama", 3, "float32"):
        assert result["layout"] == "padded"
        assert result["layout_reason"] == "LlamaAttention has 4 heads for 3 ranks"


def exchanged(heads: int, key_value_heads: int) -> bool:
    """Whether every head of a rank meets the key-value head that it has in the whole row."""
    with collectives.process_group(from_environment()):
        team = join_team(dist.get_world_size())
        assert team is not None
        count = 5  # tokens, which no number of ranks here divides
        part = team.slice_of(count)
        token = torch.arange(count).float()
        row = {h: token + 100 * torch.arange(h)[:, None] for h in (heads, key_value_heads)}
        q, k, v = (
            part.take(row[h][None, :, :, None], 2)
            for h in (heads, key_value_heads, key_value_heads)
        )
        query, key, value = team.to_heads(q, k, -v.expand(-1, -1, -1, 3), count)
        own = heads // team.size
        number = (query[0, :, 0, 0] / 100).long()
        met = (key[0].repeat_interleave(own // key.shape[1], 0)[:, 0, 0] / 100).long()
        assert number.tolist() == list(range(team.rank * own, (team.rank + 1) * own))
        assert met.tolist() == (number // (heads // key_value_heads)).tolist()
        assert query.shape == (1, own, count, 1) and value.shape[2:] == (count, 3)
        assert torch.equal(query[0, :, :, 0] % 100, token.expand(own, -1))
        assert torch.equal(value, -key.expand_as(value))
        back = team.to_tokens(query.transpose(1, 2))
        real = part.is_there(back.device)
        assert torch.equal(back[:, real], q.transpose(1, 2)[:, real]) and not back[:, ~real].any()
        return True


@pytest.mark.parametrize(
    ("ranks", "heads", "key_value_heads"),
    [(2, 6, 3), pytest.param(4, 12, 6, marks=pytest.mark.slow), (3, 6, 2)],
)
def test_heads_meet_their_key_value_heads(ranks: int, heads: int, key_value_heads: int) -> None:
    assert all(run_ranks(ranks, exchanged, heads, key_value_heads))
