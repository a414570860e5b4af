"""Every recipe parses, fits the GPUs that it names, and trains a tiny model of its family."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import succeed
from support.ranks import ROOT
from support.tiny_models import tiny_model
from support.tiny_run import metrics_of
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.commands.plan import make_plan
from dpo_dist.config.run_config import load_config, parse_config
from dpo_dist.errors import ConfigError

FOLDER = ROOT / "examples/recipes"
Row = dict[str, Any]


def talk(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def ultrafeedback(question: str, good: str, bad: str) -> Row:
    return {"prompt": question, "chosen": talk(question, good), "rejected": talk(question, bad)}


def implicit(question: str, good: str, bad: str) -> Row:
    return {"chosen": talk(question, good), "rejected": talk(question, bad), "score_chosen": 8.0}


def orca(question: str, good: str, bad: str) -> Row:
    return {"system": "You help.", "question": question, "chosen": good, "rejected": bad}


def stack_exchange(question: str, good: str, bad: str) -> Row:
    return {"question": question, "response_j": good, "response_k": bad}


def thinking(question: str, good: str, bad: str) -> Row:
    return ultrafeedback(question, good, bad) | {"chat_template_kwargs": {"enable_thinking": True}}


def sharegpt(question: str, good: str, bad: str) -> Row:
    chosen, rejected = ({"from": "gpt", "value": answer} for answer in (good, bad))
    asked = [{"from": "human", "value": question}]
    return {"conversations": asked, "chosen": chosen, "rejected": rejected}


@dataclass(frozen=True)
class Recipe:
    """What its model is like, its rows, and the GPUs that its first lines name."""

    shape: dict[str, Any]
    row: Callable[[str, str, str], Row]
    num_gpus: int
    gpu_memory_gib: float


def shape(family: str, *sizes: int, tied: bool = False) -> dict[str, Any]:
    """The published config.json, as far as a plan depends on it."""
    hidden, inner, layers, heads, key_values, vocabulary = sizes
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


MISTRAL_7B = shape("mistral", 4096, 14336, 32, 32, 8, 32000)
OPEN_HERMES = shape("mistral", 4096, 14336, 32, 32, 8, 32002)
LLAMA_2_7B = shape("llama", 4096, 11008, 32, 32, 32, 32000)
QWEN_500M = shape("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True)
QWEN_3B = shape("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True)
TULU_8B = shape("llama", 4096, 14336, 32, 32, 8, 128264)
TULU_70B = shape("llama", 8192, 28672, 80, 64, 8, 128264)
SMOLLM3_3B = shape("smollm3", 2048, 11008, 36, 16, 4, 128256, tied=True)
OLMO3_7B = shape("olmo3", 4096, 11008, 32, 32, 32, 100278)
QWEN3_4B = shape("qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True)
RECIPES = {
    "dolphin-2.1-mistral-7b-qlora": Recipe(OPEN_HERMES, ultrafeedback, 1, 24),
    "neuralhermes-2.5-mistral-7b-qlora": Recipe(OPEN_HERMES, orca, 1, 24),
    "llama-2-7b-stack-exchange": Recipe(LLAMA_2_7B, stack_exchange, 8, 80),
    "mistral-7b-instruct-lora": Recipe(MISTRAL_7B, ultrafeedback, 1, 80),
    "zephyr-7b-full": Recipe(MISTRAL_7B, ultrafeedback, 8, 80),
    "qwen2.5-0.5b-lora": Recipe(QWEN_500M, implicit, 16, 80),
    "qwen2.5-3b-lora": Recipe(QWEN_3B, implicit, 16, 80),
    "tulu-3-8b-full": Recipe(TULU_8B, ultrafeedback, 8, 80),
    "tulu-3-70b-full": Recipe(TULU_70B, ultrafeedback, 64, 80),
    "smollm3-3b-apo": Recipe(SMOLLM3_3B, thinking, 16, 80),
    "olmo-3-7b-instruct-full": Recipe(OLMO3_7B, implicit, 32, 80),
    "qwen3-4b-instruct-lora": Recipe(QWEN3_4B, sharegpt, 1, 24),
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def test_every_recipe_is_tested() -> None:
    assert sorted(RECIPES) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_its_settings_come_from(name: str) -> None:
    text = path_of(name).read_text()
    comment = text[: text.index("\nrun:")]
    assert "Settings: " in comment and re.search(r"^# https://\S+$", comment, re.MULTILINE)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = RECIPES[name]
    (tmp_path / "config.json").write_text(json.dumps(recipe.shape))
    overrides = [f"model.path={tmp_path}", f"run.dir={tmp_path / 'out'}"]
    overrides += with_adapter(name, tmp_path, recipe)
    config = load_config(path_of(name), overrides)
    assert make_plan(config, recipe.num_gpus, recipe.gpu_memory_gib).fits
    comment = path_of(name).read_text().split("run:")[0].replace("\n# ", " ")
    gpus = "one GPU" if recipe.num_gpus == 1 else f"{recipe.num_gpus} GPUs"
    assert f"{gpus} of {recipe.gpu_memory_gib} GB" in comment
    if config.slurm.nodes is not None:
        assert config.slurm.nodes * (config.slurm.tasks_per_node or 0) == recipe.num_gpus
        assert config.ray.workers == recipe.num_gpus


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_key_in_a_recipe_is_named(name: str) -> None:
    raw = yaml.safe_load(path_of(name).read_text())
    raw["train"]["leraning_rate"] = raw["train"].pop("learning_rate")
    with pytest.raises(ConfigError) as error:
        parse_config(raw, path_of(name).name)
    expected = "\n  train.leraning_rate: unknown key; did you mean learning_rate?\n"
    assert expected in str(error.value)


def with_adapter(name: str, folder: Path, recipe: Recipe) -> list[str]:
    """The SFT adapter that a recipe goes on with: B is zero, as at its start."""
    if not starts_from_adapter(name):
        return []
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**recipe.shape)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return [f"adapter.path={write_adapter(model, folder / 'adapter')}"]


def starts_from_adapter(name: str) -> bool:
    return "path" in (yaml.safe_load(path_of(name).read_text()).get("adapter") or {})


def write_adapter(model: Any, folder: Path) -> Path:
    import peft

    targets = ["q_proj", "k_proj", "v_proj"]
    sft = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    for module in sft.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for factor in (module.lora_A, module.lora_B):
                factor.to_empty(device="cpu")
            torch.nn.init.normal_(module.lora_A["default"].weight)
            torch.nn.init.zeros_(module.lora_B["default"].weight)
    sft.save_pretrained(folder)
    return folder


def write_model(folder: Path, recipe: Recipe) -> Path:
    """A tiny model of the recipe's family, its head tied as the recipe's is."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder))
    model = tiny_model(recipe.shape["model_type"], vocab_size=len(tokenizer))
    model.config.pad_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.tie_word_embeddings = recipe.shape["tie_word_embeddings"]
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, recipe: Recipe, count: int) -> Path:
    with path.open("w") as stream:
        for number in range(count):
            question = f"{path.stem}: what is {number} and {number * 7}?"
            row = recipe.row(question, f"It is {number * 8}.", "I do not know it at all.")
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_with_a_tiny_model(name: str, tmp_path: Path) -> None:
    """The recipe as it stands, but for the model, the rows and their number, and the precision.

    A paged optimizer, which needs a GPU, becomes AdamW.
    """
    from transformers import AutoModelForCausalLM

    recipe = RECIPES[name]
    raw = yaml.safe_load(path_of(name).read_text())
    overrides = [
        f"run.dir={tmp_path / 'out'}", f"model.path={write_model(tmp_path / 'model', recipe)}",
        "model.dtype=float32", "data.max_length=128", "data.num_workers=1", "train.max_steps=3",
        "train.global_batch_size=4", "train.micro_batch_tokens=512", "export.dtype=float32",
        "checkpoint.every_steps=3", "eval.every_steps=3", "local.workers=1",
        "logging.tensorboard=false",
    ]  # fmt: skip
    if "eval_fraction" in raw["data"]:
        overrides.append("data.eval_fraction=0.2")  # of 24 rows, not of thousands
    if str(raw["train"].get("optimizer")).startswith("paged"):
        overrides.append("train.optimizer=adamw")  # paging is unified memory's, of a GPU
    if starts_from_adapter(name):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        overrides.append(f"adapter.path={write_adapter(model, tmp_path / 'adapter')}")
    for split in set(raw["data"]) & {"train", "eval"}:
        rows = write_rows(tmp_path / f"{split}.jsonl", recipe, 24 if split == "train" else 4)
        source = raw["data"][split][0] | {"path": str(rows), "split": "train"}
        overrides.append(f"data.{split}={json.dumps([source])}")
    succeed("run", path_of(name), *overrides)
    steps = [line["step"] for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert steps == [1, 2, 3]
    exports = sorted(path.name for path in (tmp_path / "out/export").iterdir() if path.is_dir())
    assert exports == (["adapter", "merged"] if raw.get("adapter") else ["full"])
    assert (tmp_path / "out/verify.json").is_file()
