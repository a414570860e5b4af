"""Pairs of a prompt in one row, `prompt | a1 | ... | aK`: the numbers of pairs that stand alone."""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.objective.pair_logps import Terms

TERMS = Terms(ld_alpha=0.3, unweighted=True, prompt=True, sum_sq=True)


def ranked(num_answers: int) -> list[PairIds]:
    """All pairs of the answers to two prompts, shuffled, and a pair that shares nothing."""
    chance = random.Random(num_answers)

    def ids(count: int) -> list[int]:
        return [chance.randrange(3, 128) for _ in range(count)]

    pairs: list[PairIds] = [(ids(5), ids(3), ids(9))]
    for length in (21, 1):
        prompt, answers = ids(length), [ids(chance.randint(1, 14)) for _ in range(num_answers)]
        answers[0] = [answers[0][0], ~7, ~8, *answers[0]]  # a tool's words in between
        pairs += [(prompt, one, other) for one, other in itertools.combinations(answers, 2)]
    chance.shuffle(pairs)
    return pairs


def scored(family: str, layout: Any, pairs: list[PairIds], shared: bool) -> tuple[Any, Any]:
    """Columns of every kind, and the gradients of a loss that weighs each one differently."""
    model = tiny_model(family)
    experts = num_experts(model) if family in ("mixtral", "qwen3_moe") else 0
    terms = dataclasses.replace(TERMS, num_experts=experts)
    packed = pack_pairs(pairs, terms=terms, shared=shared)
    assert packed.is_merged == shared
    columns = score_pairs(PairScorer(model, layout=layout), packed)
    weights = torch.linspace(0.5, 1.5, columns.numel()).view_as(columns).clone()
    for name, part in terms.split(weights).items():
        if name in ("sum_sq", "expert_counts"):
            part.zero_()
    (columns * weights).sum().backward()
    return columns, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_answers", [2, 4])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral", "mixtral"])
def test_shared_parts_change_no_number(family: str, layout: Any, num_answers: int) -> None:
    pairs = ranked(num_answers) + ranked(num_answers)[:1]  # and a pair that comes twice
    columns, gradients = scored(family, layout, pairs, shared=True)
    expected, expected_gradients = scored(family, layout, pairs, shared=False)
    torch.testing.assert_close(columns, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, one in expected_gradients.items():
        scale = max(1.0, one.abs().max().item())
        assert (gradients[name] - one).abs().max() <= 1e-5 * scale, name


def test_tokens_of_four_answers_and_six_pairs() -> None:
    """6 P + 12 R tokens become P + 4 R."""
    prompt, answers = [5] * 40, [[number] * 10 for number in range(10, 14)]
    pairs = [(prompt, one, other) for one, other in itertools.combinations(answers, 2)]
    assert pack_pairs(pairs, shared=False).num_tokens == 6 * 40 + 12 * 10
    assert pack_pairs(pairs).num_tokens == 40 + 4 * 10


def test_an_answer_sees_no_other_answer() -> None:
    """Other tokens in the first three of four answers leave the last one's score as it is."""
    scorer = PairScorer(tiny_model("llama"))
    prompt, last = [9, 8, 7, 6], [4, 5, 6]

    def score_last(others: list[list[int]]) -> float:
        packed = pack_pairs([(prompt, other, last) for other in others])
        assert len(packed.answer_lengths) == 4
        return score_pairs(scorer, packed)[-1, 1].item()

    with torch.no_grad():
        one = score_last([[11, 12], [13, 14], [15, 16]])
        assert one == score_last([[21, 22], [23, 24], [25, 26]])


def test_a_model_whose_frequencies_depend_on_the_length_wants_each_pair_alone() -> None:
    scorer = PairScorer(tiny_model("phi3_longrope"))
    assert not scorer.shares_prompts and PairScorer(tiny_model("llama")).shares_prompts
    with pytest.raises(AssertionError, match=r"pack_pairs\(..., shared=False\)"):
        scorer(pack_pairs(ranked(3)))
    scorer(pack_pairs(ranked(3), shared=False))
