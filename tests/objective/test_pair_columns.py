"""Every sum over a pair's tokens that a loss may ask for, against the whole logits."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from support.oracles.plain_columns import plain_columns
from support.tiny_models import tiny_model

from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.errors import ConfigError
from dpo_dist.objective.pair_logps import Terms

TERMS = Terms(ld_alpha=0.3, unweighted=True, prompt=True, sum_sq=True)


def pairs() -> list[PairIds]:
    """Either answer the longer one, answers of one token, and a prompt of one."""
    chance = random.Random(0)

    def ids(count: int) -> list[int]:
        return [chance.randrange(3, 128) for _ in range(count)]

    return [(ids(21), ids(9), ids(14)), (ids(4), ids(12), ids(1)), (ids(1), ids(2), ids(10))]


def as_batch(rows: list[PairIds]) -> dict[str, torch.Tensor]:
    """Right-padded rows, prompt + chosen of all pairs, then prompt + rejected of all."""
    sequences = [(row[0], row[side]) for side in (1, 2) for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    batch = {
        name: torch.zeros(len(sequences), width, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for number, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        batch["input_ids"][number, :end] = torch.tensor([*prompt, *answer])
        batch["attention_mask"][number, :end] = 1
        batch["completion_mask"][number, len(prompt) : end] = 1
    return batch


def gradients(model: Any, columns: torch.Tensor, terms: Terms) -> dict[str, torch.Tensor]:
    """Of every parameter, for a loss of all columns but those that pass no gradient on."""
    weights = torch.linspace(0.5, 1.5, columns.numel()).view_as(columns).clone()
    for name, part in terms.split(weights).items():
        if name in ("sum_sq", "expert_counts"):
            part.zero_()
    (columns * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["gemma2", "mixtral", "qwen3_moe"])
def test_every_column_equals_the_whole_logits(family: str, layout: Any) -> None:
    model, twin = tiny_model(family), tiny_model(family)
    experts = 0 if family == "gemma2" else num_experts(model)
    assert experts in (0, 4)
    terms = dataclasses.replace(TERMS, num_experts=experts)
    columns = score_pairs(PairScorer(model, layout=layout), pack_pairs(pairs(), terms=terms))
    plain = plain_columns(twin, as_batch(pairs()), terms)
    assert columns.shape == (3, terms.num_columns)
    torch.testing.assert_close(columns, plain, atol=1e-4, rtol=1e-5)
    ours, theirs = gradients(model, columns, terms), gradients(twin, plain, terms)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_asked_for_is_not_there() -> None:
    scorer = PairScorer(tiny_model("llama"))
    assert score_pairs(scorer, pack_pairs(pairs())).shape == (3, 2)
    alone = score_pairs(scorer, pack_pairs(pairs(), terms=Terms(prompt=True)))
    torch.testing.assert_close(alone[:, :2], score_pairs(scorer, pack_pairs(pairs())))
    assert alone[2, 2] == 0  # a prompt of one token predicts nothing of itself
    packed = pack_pairs(pairs(), terms=Terms(prompt=True))
    assert packed.target_lengths == (9, 14, 12, 1, 2, 10, 20, 3, 0)


def test_a_model_without_routers_has_no_balance() -> None:
    with pytest.raises(ConfigError) as caught:
        num_experts(tiny_model("llama"))
    assert str(caught.value) == (
        "objective.router_aux_loss_coef is set and LlamaForCausalLM gives no router logits; "
        "expected "
        "a mixture of experts whose routers are known to transformers. Set "
        "objective.router_aux_loss_coef to 0."
    )
