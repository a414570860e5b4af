"""An adapter to start from: read as peft reads it, and refused where it does not fit."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny_models import tiny_model
from support.weights.start_adapters import edited, logits, save_adapter
from support.weights.trained_weights import adapted, save_base
from transformers import AutoModelForCausalLM

from dpo_dist.config.run_config import parse_config
from dpo_dist.config.training_section import AdapterSection, ModelSection
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.policy import PolicyParts, load_policy
from dpo_dist.errors import ConfigError, ModelFilesError
from dpo_dist.model_files.adapter import (
    ADAPTER_CONFIG_NAME,
    digest_of_adapter,
    resolve_adapter_dir,
)
from dpo_dist.model_files.files import check_named_base, resolve_model_dir
from dpo_dist.model_files.of_run import RunModels

CPU = torch.device("cpu")
CONTINUE = AdapterSection(path="sft")


def start(base: Path, folder: Path, adapter: AdapterSection = CONTINUE) -> Any:
    section = ModelSection(path=str(base), dtype="float32")
    return load_policy(PolicyParts(base, section, adapter, folder), CPU)


ADAPTERS = {
    "patterns": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 9.0}}),
    "dora, head saved": ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    "rslora, embeddings adapted": (
        "llama_tied",
        {"use_rslora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "experts": ("mixtral", {}),
    "one parameter of the experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_policy_starts_where_the_adapter_ended(case: str, tmp_path: Path) -> None:
    family, settings = ADAPTERS[case]
    base = save_base(tmp_path / "base", family)
    folder, trained = save_adapter(tmp_path / "sft", base, family, **settings)
    policy = start(base, folder)
    assert torch.equal(logits(policy), logits(trained))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model, folder)), logits(policy))
    assert (logits(tiny_model(family)) - logits(policy)).abs().max() > 1e-2
    trains = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in trained.named_parameters() if p.requires_grad}


def test_dropout_is_the_runs_own(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    folder, _ = save_adapter(tmp_path / "sft", base, "llama", dropout=0.5)
    assert start(base, folder).peft_config["default"].lora_dropout == 0.0
    with_dropout = start(base, folder, AdapterSection(path="sft", dropout=0.25))
    assert with_dropout.peft_config["default"].lora_dropout == 0.25


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    other = save_base(tmp_path / "other", "phi3")
    folder, _ = save_adapter(tmp_path / "sft", other, "phi3")
    with pytest.raises(ModelFilesError) as caught:
        check_named_base(folder, str(base))
    assert str(caught.value) == (
        f"the adapter {folder} was trained on {other}, and model.path is {base}; expected the "
        f"adapter's own base model. Set model.path to {other}. If both are the same model under "
        f"two names, put yours into base_model_name_or_path of {folder / ADAPTER_CONFIG_NAME}."
    )
    with pytest.raises(ModelFilesError) as caught:
        start(base, folder)
    said = str(caught.value)
    name = "base_model.model.model.layers.0.mlp.gate_up_proj.lora_A.weight"
    assert said.startswith(
        f"the adapter {folder} does not fit the model: {name} is in the adapter only; "
    )
    assert said.endswith(
        "in all; expected an adapter of this base model. Set model.path to the model that the "
        "adapter was trained on."
    )


def test_a_longer_vocabulary_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    longer = tiny_model("llama", vocab_size=130)
    section = AdapterSection(rank=3, modules_to_save=["embed_tokens", "lm_head"])
    policy, _ = adapted(longer, section, base)
    policy.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    with pytest.raises(ModelFilesError) as caught:
        start(base, tmp_path / "sft")
    assert str(caught.value).endswith(
        "lm_head.weight is (130, 32) in the adapter and (128, 32) in the model; expected an "
        "adapter of this base model. Set model.path to the model that the adapter was trained on; "
        "if it was trained with a longer vocabulary, name the added tokens in model.add_tokens. If "
        "its file holds embeddings that it did not train, merge it with peft and set model.path to "
        "the result."
    )


def test_folders_are_compared_by_their_weights(tmp_path: Path) -> None:
    """Models of several runs are all called `base`, and fit each other's adapters."""
    base = save_base(tmp_path / "one" / "base", "llama")
    folder, _ = save_adapter(tmp_path / "sft", base, "llama")
    check_named_base(folder, str(save_base(tmp_path / "copied", "llama")))
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "two" / "base")
    with pytest.raises(ModelFilesError, match="was trained on"):
        check_named_base(folder, str(tmp_path / "two" / "base"))


@pytest.mark.parametrize("same", ["{base}", "org/BASE", "models--org--base/snapshots/0123"])
def test_one_model_under_several_names(same: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    folder, _ = save_adapter(tmp_path / "sft", base, "llama")
    edited(folder, base_model_name_or_path=same.format(base=base))
    check_named_base(folder, str(base))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights=pissa_niter_4, which "),
        ({"bias": "all"}, "has bias=all"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices=[3]"),
        ({"peft_type": "IA3"}, "is of kind "),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")  # LoRA's, for IA3
def test_what_is_more_than_lora(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    folder, _ = save_adapter(tmp_path / "sft", base, "llama")
    with pytest.raises(ModelFilesError) as caught:
        start(base, edited(folder, **change))
    assert str(caught.value).startswith(f"the adapter {folder} {found}")
    assert str(caught.value).endswith(
        "expected LoRA, rsLoRA or DoRA that leaves the base model as its files have it. Merge it "
        "with peft (merge_and_unload, save_pretrained) and set model.path to the result."
    )


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError) as caught:
        resolve_adapter_dir(str(tmp_path))
    assert str(caught.value).startswith(f"adapter.path {tmp_path} has no adapter_config.json; ")


def test_an_adapter_is_no_model_even_beside_one(tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and none of these weights."""
    base = save_base(tmp_path / "base", "llama")
    folder, _ = save_adapter(tmp_path / "sft", base, "llama")
    for _ in range(2):
        with pytest.raises(ModelFilesError) as caught:
            resolve_model_dir(str(folder))
        assert str(caught.value) == (
            f"{folder} holds an adapter (adapter_config.json); expected a whole model. To train on "
            f"from it, set adapter.path to {folder} and model.path to its base model ({base})."
        )
        save_base(folder, "llama")  # now with a whole model in the same folder


def test_the_start_is_base_and_adapter(tmp_path: Path) -> None:
    """The digest in the scoring contract and in checkpoints follows both."""
    base = save_base(tmp_path / "base", "llama")
    one, _ = save_adapter(tmp_path / "one", base, "llama")
    two, _ = save_adapter(tmp_path / "two", base, "llama", alpha=5.0)
    assert digest_of_adapter(one) != digest_of_adapter(two)

    def digest(adapter: dict[str, Any] | None) -> str:
        raw = {
            "run": {"dir": str(tmp_path / "out")}, "model": {"path": str(base)},
            "data": {"train": [{"path": "a"}]}, "adapter": adapter,
        }  # fmt: skip
        return RunModels(parse_config(raw)).start_digest

    digests = [digest(None), digest({"path": str(one)}), digest({"path": str(two)})]
    assert len(set(digests)) == 3 and digest({}) == digests[0]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_nothing(key: str) -> None:
    adapter = AdapterSection.model_validate({"target_modules": ["q_proj"], key: {"w_pack": 4}})
    with (
        pytest.warns(RuntimeWarning, match=rf"{key} keys did not match .*w_pack"),  # all peft does
        pytest.raises(ConfigError) as caught,
    ):
        add_adapter(tiny_model("llama"), adapter, "base")
    assert str(caught.value) == (
        f"adapter.{key}: w_pack fits no adapted module; expected the end of a name, such as q_proj "
        f"or layers.0.q_proj, or a regular expression for it. Correct adapter.{key}."
    )


def test_a_parameter_that_is_not_there() -> None:
    adapter = AdapterSection(target_parameters=["experts.w9"])
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("mixtral"), adapter, "base")
    assert str(caught.value) == (
        "adapter.target_parameters: the model has no parameter experts.w9; expected names of its "
        "parameters, such as down_proj, gate_up_proj. Correct adapter.target_parameters."
    )
