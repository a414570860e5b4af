"""Rotary embeddings that depend on the length: a pair's numbers are the same beside any other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import plain_scores
from support.tiny_models import tiny_model

from dpo_dist.engine.forward.layout_choice import NO_LEAK, check_neighbors, settle
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer
from dpo_dist.errors import ConfigError

CPU = torch.device("cpu")
LAYOUTS: list[Layout] = ["packed", "padded", "plain"]
KINDS = ["phi3_longrope", "phimoe_longrope", "gemma3_longrope", "llama_dynamic"]


def pairs() -> dict[str, PairIds]:
    """A pair on either side of 64 positions, and those of which one answer is."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 128) for _ in range(count)]

    return {
        "short": (ids(20), ids(9), ids(14)),
        "long": (ids(70), ids(12), ids(5)),
        "longer": (ids(80), ids(20), ids(25)),
        "long rejected": (ids(40), ids(8), ids(40)),
        "long chosen": (ids(30), ids(50), ids(4)),
    }


@pytest.mark.fault(
    40,
    "rotary scaling by the longest position, six kinds",
    becomes="a pair scores as it does alone",
)
@pytest.mark.parametrize("family", [*KINDS, "stablelm_dynamic"])
@torch.no_grad()
def test_truth_02_a_pair_scores_the_same_beside_any_other(family: str) -> None:
    """As in a padded batch of this pair alone, of TRL's kind, on a model just loaded."""
    scorer, rows = PairScorer(tiny_model(family)), list(pairs().values())
    alone = torch.stack([padded_batch(family, row) for row in rows])
    for layout in LAYOUTS[1:] if family == "stablelm_dynamic" else LAYOUTS:
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 1], [0], [4]):
            scores = scorer(pack_pairs([rows[i] for i in order]), layout)
            torch.testing.assert_close(scores, alone[order], atol=2e-4, rtol=1e-5)


def padded_batch(family: str, row: PairIds) -> torch.Tensor:
    """(2,) log-probs from the logits of a fresh model for both sequences, padded on the right."""
    prompt, *answers = row
    width = len(prompt) + max(map(len, answers))
    padded = [[*prompt, *ids] + [0] * (width - len(prompt) - len(ids)) for ids in answers]
    lengths = torch.tensor([len(prompt) + len(ids) for ids in answers])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.tensor(padded)
    model: Any = tiny_model(family)
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    scored = logps.gather(2, ids[:, 1:, None]).squeeze(2)[:, len(prompt) - 1 :]
    return (scored * mask[:, len(prompt) :]).sum(1)


@pytest.mark.parametrize("family", [*KINDS, "stablelm_dynamic"])
@pytest.mark.parametrize("asked", ["auto", "padded"])
def test_truth_02_the_self_check_sees_what_it_allows(
    family: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = PairScorer(tiny_model(family))
    settled = settle(scorer, layout=asked)
    layout = "padded" if asked == "padded" or family == "stablelm_dynamic" else "packed"
    assert settled.layout == scorer.layout == layout
    # Not zero where experts take tokens of both pairs into one product, whose size then changes.
    assert check_neighbors(scorer, CPU) <= NO_LEAK[torch.float32]
    for module in scorer._rotary:
        monkeypatch.setattr(module, "_forward_hooks", {})  # as transformers has it
    with pytest.raises(ConfigError) as caught:
        check_neighbors(scorer, CPU)
    kind = "longrope" if "longrope" in family else "dynamic"
    assert f"(rope_type: {kind}) takes its frequencies from the longest" in caught.value.found
    assert "another move by " in caught.value.found
    assert "rope_parameters.rope_type" in caught.value.remedy


@pytest.mark.fault(40, "rotary scaling that calls itself default", becomes="found at load")
def test_truth_02_a_kind_that_calls_itself_default_is_seen() -> None:
    model = tiny_model("llama_dynamic")
    model.config.rope_parameters["rope_type"] = "default"
    with pytest.raises(ConfigError, match=r"\(rope_type: default\) takes .* another move by "):
        check_neighbors(PairScorer(model), CPU)


@pytest.mark.fault(40, "rotary scaling that cannot be tried", becomes="refused")
def test_truth_02_what_cannot_be_tried_is_refused() -> None:
    """Code of its own that hands its embedding a length instead of positions."""
    scorer = PairScorer(tiny_model("llama"))
    scorer.policy.config.rope_parameters["rope_type"] = "ntk"
    with pytest.raises(ConfigError) as caught:
        settle(scorer)
    assert caught.value.found == (
        "LlamaForCausalLM (rope_type: ntk) takes its frequencies from the longest sequence of a "
        "forward: beside a longer pair the log-probs of another may change, and its code does not "
        "let that be tried"
    )
    assert (
        caught.value.expected == "log-probs of a pair that are the same whatever stands beside it"
    )


@torch.no_grad()
def test_generation_keeps_the_embedding_of_transformers() -> None:
    scorer, ids = PairScorer(tiny_model("phi3_longrope")), [*range(3, 93)]
    scorer(pack_pairs([pairs()["short"]]))
    scorer.use_own_attention()
    expected = plain_scores(tiny_model("phi3_longrope"), [(ids, [5, 6], [7])])
    torch.testing.assert_close(plain_scores(scorer.policy, [(ids, [5, 6], [7])]), expected)
