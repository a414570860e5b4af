"""Settings that reach a library: each is flipped where its effect can be seen without a network."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.forward.generation import Sampling, answer
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.load import load_model
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.errors import ConfigError

CPU = torch.device("cpu")
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "remote_llama"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.fault(29, "a model with code of its own", becomes="refused unless trusted")
def test_remote_code_runs_only_when_trusted(tmp_path: Path) -> None:
    import json

    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "remote.py").write_text(REMOTE_CODE)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "remote_llama"
    config["auto_map"] = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path, ModelSection(path="m", dtype="float32"), device=CPU)
    section = ModelSection(path="m", dtype="float32", trust_remote_code=True)
    assert type(load_model(tmp_path, section, device=CPU)).__name__ == "Model"


def test_layout_is_tried_forced_or_refused() -> None:
    llama, mamba = (PairScorer(tiny_model(family)) for family in ("llama", "mamba"))
    for scorer, expected, settled in (
        (llama, "auto", "packed"),
        (llama, "padded", "padded"),
        (mamba, "auto", "padded"),
    ):
        section = ModelSection(path="m", dtype="float32", layout=expected)  # pyright: ignore
        assert settle_layout(scorer, scorer, section, CPU) == settled
        assert scorer.layout == settled
    section = ModelSection(path="m", dtype="float32", layout="packed")
    with pytest.raises(ConfigError) as caught:
        settle_layout(mamba, mamba, section, CPU)
    message = str(caught.value)
    assert message.startswith("model.layout is packed, but ")
    assert message.endswith(
        "expected a layout in which the model scores right. Set model.layout to auto."
    )


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from dpo_dist.errors import ModelFilesError

    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFilesError) as caught:
        load_model(tmp_path, ModelSection(path="m", dtype="float32"), device=CPU)
    assert str(caught.value) == (
        f"{tmp_path} does not fill the model: missing model.norm.weight (of 1); expected a value "
        "for every weight. Download the model again, or check that it is a causal LM."
    )


def test_temperature_samples(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    prompts = [[5, 6, 7], [8, 9]]
    greedy = answer(model, tokenizer, prompts, Sampling(8))
    assert greedy == answer(model, tokenizer, prompts, Sampling(8))
    torch.manual_seed(0)
    sampled = answer(model, tokenizer, prompts, Sampling(8, temperature=5.0))
    assert sampled != greedy
