"""The base model that a run makes for itself: more tokens, or an adapter merged in."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_model
from support.tiny_run import make_run
from support.weights.start_adapters import edited, logits, save_adapter
from support.weights.trained_weights import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.export.own_base import lengthen, merge_start
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.errors import ArtifactError, ConfigError, DataError
from dpo_dist.inputs.setup import count_shape
from dpo_dist.model_files.files import digest_of_weights
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.stages import prepare

FRESH = AdapterSection(path="sft", start="merge")
TOKENS = 'model.add_tokens=["<|tool|>","<|plan|>"]'


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi", "gpt_neox", "gpt2", "mixtral"])
def test_lengthened_embeddings(family: str, tmp_path: Path) -> None:
    """New rows are the mean of the old, the old rows and all else stay; also a head's bias."""
    source, old = save_base(tmp_path / "base", family), tiny_model(family)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        assert lengthen(source, folder, 130, (128, 129), 32) == 160
    assert digest_of_weights(tmp_path / "one") == digest_of_weights(tmp_path / "two")
    new = load(tmp_path / "one")
    assert new.config.get_text_config().vocab_size == 160
    ends = [m for m in (new.get_input_embeddings(), new.get_output_embeddings())]
    tables = [p for m in ends for p in m.parameters()]
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        if any(after is table for table in tables):
            assert torch.equal(after[:128], before)
            assert torch.equal(after[128:], before.double().mean(0).float().expand_as(after[128:]))
        else:
            assert torch.equal(after, before)
    assert torch.equal(logits(new)[..., :128], logits(old))


def test_a_token_in_a_row_that_nobody_trained(tmp_path: Path) -> None:
    """Many models have more rows than tokens; a token that lands there starts like any other."""
    source = save_base(tmp_path / "base", "llama")
    (tmp_path / "out").mkdir()
    assert lengthen(source, tmp_path / "out", 121, (120,), None) == 128
    rows = load(tmp_path / "out").get_input_embeddings().weight
    others = torch.cat([rows[:120], rows[121:]]).double().mean(0).float()
    assert torch.equal(rows[120], others)


def test_tied_embeddings_that_are_stored_twice(tmp_path: Path) -> None:
    source = save_base(tmp_path / "base", "llama_tied")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    lengthen(source, tmp_path / "out", 130, (128, 129), None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert len(written["lm_head.weight"]) == 130


MERGED = {
    "patterns": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 9.0}}),
    "dora, embeddings and head saved": (
        "llama_tied",
        {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "one parameter of the experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_a_merged_adapter(case: str, tmp_path: Path) -> None:
    family, settings = MERGED[case]
    source = save_base(tmp_path / "base", family)
    folder, policy = save_adapter(tmp_path / "sft", source, family, **settings)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        merge_start(source, tmp_path / name, FRESH, folder, "float32")
    assert digest_of_weights(tmp_path / "one") == digest_of_weights(tmp_path / "two")
    torch.testing.assert_close(logits(load(tmp_path / "one")), logits(policy), rtol=0, atol=2e-4)
    assert (logits(policy) - logits(tiny_model(family))).abs().max() > 1e-2


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("start"))


def config_of(run_yaml: Path, out: Path, *overrides: str) -> RunConfig:
    return load_config(run_yaml, [f"run.dir={out}", *overrides])


def test_a_run_with_added_tokens(run_yaml: Path, tmp_path: Path) -> None:
    """model.add_tokens= and model.pad_vocab_to_multiple= make a base that every stage reads."""
    config = config_of(run_yaml, tmp_path, TOKENS, "model.pad_vocab_to_multiple=64")
    with pytest.raises(ArtifactError, match="base/MANIFEST.json does not exist"):
        RunModels(config).base.exists()
    planned = count_shape(config, None)
    prepare.run(config)
    base = RunModels(config).base
    assert base == tmp_path / "base" and RunModels(config).start_digest == digest_of_weights(base)
    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base)
    old = AutoTokenizer.from_pretrained(config.model.path)
    assert len(tokenizer) == len(old) + 2
    assert tokenizer.encode("<|tool|><|plan|>") == [len(old), len(old) + 1]
    assert tokenizer.decode([len(old), 5], skip_special_tokens=True) == old.decode([5])
    assert tokenizer.chat_template == old.chat_template
    assert len(model.get_input_embeddings().weight) % 64 == 0
    counted = count_model(base, None)
    assert planned == counted == count_shape(config, None)
    prepare.run(config)  # current
    with pytest.raises(ArtifactError, match=r"base was made by `base` from other settings \(pad_"):
        RunModels(config_of(run_yaml, tmp_path, TOKENS)).base.exists()


def test_padding_alone(run_yaml: Path, tmp_path: Path) -> None:
    config = config_of(run_yaml, tmp_path, "model.pad_vocab_to_multiple=1000")
    prepare.run(config)
    assert load(RunModels(config).base).config.vocab_size == 1000


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_new_tokens_that_would_stay_frozen(run_yaml: Path, tmp_path: Path, module: str) -> None:
    config = config_of(run_yaml, tmp_path, TOKENS, f"adapter.modules_to_save=[{module}]")
    with pytest.raises(ConfigError) as caught:
        prepare.run(config)
    frozen = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[module]
    assert str(caught.value) == (
        f"model.add_tokens: the adapter leaves {frozen} frozen, so that the new tokens would all "
        "stay the same; expected embeddings and head that train. Set adapter.modules_to_save to "
        "[embed_tokens, lm_head]."
    )
    assert not (tmp_path / "base").exists() and not (tmp_path / "pairs").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(run_yaml: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run_yaml.parent / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    template = tmp_path / "turn.jinja"
    template.write_text("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
    config = config_of(run_yaml, tmp_path / "out", f"model.path={model}")
    prepare.run(config)  # nothing uses the token: gemma-3-1b is such a model
    config = config_of(
        run_yaml, tmp_path / "two", f"model.path={model}", f"data.chat_template={template}"
    )
    with pytest.raises(DataError) as caught:
        prepare.run(config)
    assert str(caught.value) == (
        f"the tokenizer has {size + 1} tokens and the model embeddings for {size}; the pairs use "
        f"token {size}; expected an embedding for every token of the pairs. Name the tokens in "
        "model.add_tokens (<|turn|>), which lengthens the embeddings, or use the tokenizer that "
        "belongs to the model."
    )
    assert not (tmp_path / "two" / "pairs").exists()
    prepare.run(config_of(
        run_yaml, tmp_path / "three", f"model.path={model}", f"data.chat_template={template}",
        'model.add_tokens=["<|turn|>"]',
    ))  # fmt: skip
    assert load(tmp_path / "three" / "base").config.vocab_size == size + 1


def test_an_adapter_with_added_tokens_is_merged(run_yaml: Path, tmp_path: Path) -> None:
    """After SFT with a longer vocabulary: the base is lengthened first, then the adapter fits."""
    model = run_yaml.parent / "model"
    size = len(AutoTokenizer.from_pretrained(model))
    section = AdapterSection(rank=3, modules_to_save=["embed_tokens", "lm_head"])
    from support.weights.trained_weights import adapted

    policy, _ = adapted(tiny_model("llama", vocab_size=size + 2), section, model)
    policy.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    edited(tmp_path / "sft", base_model_name_or_path=str(model))
    config = config_of(
        run_yaml, tmp_path / "out", TOKENS, f"adapter.path={tmp_path / 'sft'}",
        "adapter.start=merge", "adapter.modules_to_save=[embed_tokens,lm_head]",
    )  # fmt: skip
    prepare.run(config)
    base = load(RunModels(config).base)
    saved = policy.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(base.lm_head.weight, saved)
    assert not (RunModels(config).base / "longer").exists()
