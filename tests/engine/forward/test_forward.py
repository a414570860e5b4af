"""The one forward against plain transformers forwards: log-probs and gradients of every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import PACKED, PADDED, adapted, pairs, plain_scores
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.forward.attention import PackedAttentionError
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, score_pairs
from dpo_dist.errors import ConfigError


def gradients(model: nn.Module, scores: Tensor) -> dict[str, Tensor]:
    """Of every parameter, for a loss that weighs each completion differently."""
    model.zero_grad()
    (scores * torch.arange(1.0, scores.numel() + 1).view_as(scores)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and theirs
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1.0)
        assert (ours[name] - expected).abs().max() <= 1e-4 * scale, name


def assert_equals_plain(policy: nn.Module, layout: Layout) -> None:
    """Scores and gradients of `policy` in a layout, against a copy that is run plainly."""
    plain = copy.deepcopy(policy)
    scores = score_pairs(PairScorer(policy, layout=layout), pack_pairs(pairs()))
    expected = plain_scores(plain, pairs())
    assert scores.dtype == torch.float32 and scores.shape == (3, 2)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert_same_gradients(gradients(policy, scores), gradients(plain, expected))


@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_two_plain_forwards(family: str) -> None:
    assert_equals_plain(tiny_model(family), "packed")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", *PADDED])
def test_padded_equals_two_plain_forwards(family: str) -> None:
    assert_equals_plain(tiny_model(family), "padded")


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
def test_plain_layout_is_the_models_own_logits(family: str) -> None:
    assert_equals_plain(tiny_model(family), "plain")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "qwen2_moe"])
def test_a_window_or_sink_that_were_dropped_would_show(family: str) -> None:
    """The equality above can fail: without the term the scores are far from equal."""
    model = tiny_model(family)
    scores = plain_scores(model, pairs())
    if family == "gpt_oss":
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.data.fill_(-30.0)
    elif family == "gemma2":
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 1e9
    else:
        model.config.sliding_window = 10**6
    assert (plain_scores(model, pairs()) - scores).abs().max() > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # checkpointing happens in train mode only
            module.p = 0.0
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls: list[bool] = []
    attention = [m for name, m in model.named_modules() if name.endswith(("self_attn", "attn"))]
    attention[0].register_forward_hook(lambda *_: calls.append(True))
    scores = score_pairs(PairScorer(model), pack_pairs(pairs()))
    assert_same_gradients(gradients(model, scores), gradients(plain, plain_scores(plain, pairs())))
    assert len(calls) == 2  # once forward, once in backward


def test_a_model_that_cannot_be_packed_says_so() -> None:
    with pytest.raises(PackedAttentionError, match="BloomForCausalLM has an attention of its own"):
        score_pairs(PairScorer(tiny_model("bloom")), pack_pairs(pairs()))


def test_layouts_may_alternate_on_one_scorer() -> None:
    scorer = PairScorer(tiny_model("gemma2"))
    packed = pack_pairs(pairs())
    first, plain, again = (scorer(packed, layout) for layout in ("packed", "plain", "packed"))
    assert first.equal(again)
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-4)


def test_two_scorers_may_share_a_model() -> None:
    model = tiny_model("llama")
    packed = pack_pairs(pairs())
    PairScorer(model)(packed)
    torch.testing.assert_close(
        PairScorer(model)(packed, "plain"), plain_scores(tiny_model("llama"), pairs())
    )


def test_rejected_does_not_see_chosen() -> None:
    """Bit-equal in bfloat16, where an agreement with plain forwards is only rough."""
    scorer = PairScorer(tiny_model("llama", dtype=torch.bfloat16))
    rows = pairs()
    others = [(prompt, [token - 1 for token in ids], rejected) for prompt, ids, rejected in rows]
    first, second = (scorer(pack_pairs(each)) for each in (rows, others))
    assert first[:, 1].equal(second[:, 1])
    assert (first[:, 0] - second[:, 0]).abs().min() > 0.1


def test_scores_do_not_depend_on_the_company() -> None:
    scorer = PairScorer(tiny_model("mistral"))
    together = scorer(pack_pairs(pairs()))
    alone = torch.cat([scorer(pack_pairs([pair])) for pair in pairs()])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_adapters_are_scored_and_get_their_gradients(settings: dict[str, Any]) -> None:
    assert_equals_plain(adapted(**settings), "packed")


def test_adapter_with_tied_head_and_reentrant_checkpointing() -> None:
    policy = adapted("llama_tied")
    plain = copy.deepcopy(policy)
    policy.activation_checkpointing_enable({"use_reentrant": True})
    policy.enable_input_require_grads()
    policy.train()
    scores = score_pairs(PairScorer(policy), pack_pairs(pairs()))
    assert_same_gradients(gradients(policy, scores), gradients(plain, plain_scores(plain, pairs())))


def test_saved_head_follows_the_adapter_on_and_off() -> None:
    policy = adapted(modules_to_save=["lm_head"])
    scorer = PairScorer(policy)
    with policy.disable_adapter():
        torch.testing.assert_close(
            scorer(pack_pairs(pairs())), plain_scores(tiny_model("llama"), pairs())
        )
        off = scorer(pack_pairs(pairs()))
    assert (scorer(pack_pairs(pairs())) - off).abs().min() > 0.01


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [5]}}]
)
def test_adapter_on_the_head_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        PairScorer(adapted(**settings))
    assert str(caught.value).startswith("the adapter targets the output head (")
    assert str(caught.value).endswith(
        "; expected adapters on other layers only, because log-probs are computed from the head's "
        "weight. Remove it from adapter.target_modules; to train it whole, name it in "
        "adapter.modules_to_save."
    )


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no output embedding; expected a causal"):
        PairScorer(tiny_model("llama").model)
