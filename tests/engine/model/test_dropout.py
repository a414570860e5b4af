"""Two forwards in training mode are equal, in every family, whatever its config drops."""

import copy
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import PACKED, PADDED, pairs
from support.tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.dropout import check_no_dropout, switch_off_dropout
from dpo_dist.errors import ConfigError

CPU = torch.device("cpu")
OTHERS = (
    "starcoder2", "opt", "xglm", "biogpt", "gpt_bigcode", "falcon", "persimmon", "seed_oss",
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

EXTRA = {"seed_oss": {"head_dim": 8}}


def dropping(family: str) -> Any:
    """A tiny model with every drop or jitter key of its config at 0.1, in training mode."""
    config: Any = (
        copy.deepcopy(tiny_model(family).config)
        if family not in OTHERS
        else AutoConfig.for_model(family, **SIZES, **EXTRA.get(family, {}))
    )
    for key, value in vars(config).items():
        if ("drop" in key or "jitter" in key) and not isinstance(value, bool):
            setattr(config, key, 0.1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().train()


@pytest.mark.parametrize("family", [*OTHERS, *PACKED, *PADDED])
@torch.no_grad()
def test_truth_04_two_forwards_in_training_mode_are_equal(family: str) -> None:
    model = dropping(family)
    switch_off_dropout(model)
    scorer = PairScorer(model, layout="padded")
    packed = pack_pairs(pairs())
    assert scorer.training and torch.equal(scorer(packed), scorer(packed))
    torch.testing.assert_close(scorer(packed), scorer.eval()(packed), atol=1e-4, rtol=1e-5)


def test_truth_04_what_is_random_all_the_same_is_found_at_load() -> None:
    """By two forwards and not by a list: here a number in the code, which nothing can set."""
    scorer = PairScorer(tiny_model("llama").train())
    assert check_no_dropout(scorer, scorer, CPU) == 0.0
    layer: Any = scorer.policy.model.layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: torch.nn.functional.dropout(own(x), 0.1, layer.training)
    with pytest.raises(ConfigError) as caught:
        check_no_dropout(scorer, scorer, CPU)
    assert caught.value.found.startswith(
        "LlamaForCausalLM is random in training mode: two forwards of the same pairs are "
    )
    assert caught.value.found.endswith("nats per token apart (of its config: attention_dropout)")
    assert caught.value.expected == "the same log-probs, as the reference was scored with"
    assert "Set these keys to 0 in the model's config.json" in caught.value.remedy
    assert scorer.training
