"""`dpo-dist import` of LlamaFactory's YAML, and of the dataset_info.json beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.commands.import_config import import_config
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.engine.sharding.schedule import warmup_and_decay
from dpo_dist.errors import ConfigError
from dpo_dist.importing.llamafactory import keys
from dpo_dist.importing.run_yaml import Imported

NEEDED = {"model_name_or_path": "m", "stage": "dpo", "dataset": "prefs"}
INFO: dict[str, Any] = {
    "prefs": {"file_name": "prefs.json", "ranking": True},
    "talks": {"hf_hub_url": "org/talks", "ranking": True, "formatting": "sharegpt",
              "subset": "en", "split": "dpo", "num_samples": 500,
              "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad",
                          "system": "sys"}},
    "asked": {"file_name": "asked.json", "ranking": True, "columns": {"prompt": "q"}},
}  # fmt: skip


def write(folder: Path, info: dict[str, Any] | None, **values: Any) -> Path:
    if info is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    path = folder / "llamafactory.yaml"
    path.write_text(yaml.safe_dump(NEEDED | values))
    return path


def convert(
    folder: Path, info: dict[str, Any] | None = INFO, **values: Any
) -> tuple[RunConfig, Imported]:
    """The run config of a LlamaFactory YAML with these keys, through files as a user has them."""
    imported = import_config(write(folder, info, **values), (), 1, None)
    (folder / "run.yaml").write_text(imported.text)
    return load_config(folder / "run.yaml"), imported


def test_a_key_left_out_has_llamafactorys_default(tmp_path: Path) -> None:
    config, imported = convert(tmp_path)
    train, adapter = config.train, config.adapter
    assert (train.learning_rate, train.num_epochs, train.lr_schedule) == (5e-5, 3.0, "linear")
    assert (train.warmup_ratio, train.global_batch_size) == (0.0, 8)
    assert train.gradient_checkpointing
    assert adapter and (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16.0, 0.0)
    assert adapter.target_modules == "all-linear"
    assert (config.objective.loss, config.objective.beta) == ("sigmoid", 0.1)
    assert config.data.max_length == 2048 and imported.differs == []
    assert "alpha: 16.0  # LlamaFactory's default of lora_alpha; twice lora_rank" in imported.text


def test_the_settings_of_a_published_example(tmp_path: Path) -> None:
    """examples/train_lora/qwen3_lora_dpo.yaml of LlamaFactory."""
    config, imported = convert(
        tmp_path, trust_remote_code=True, do_train=True, finetuning_type="lora", lora_rank=8,
        lora_target="all", pref_beta=0.1, pref_loss="sigmoid", template="qwen3_nothink",
        cutoff_len=2048, max_samples=1000, preprocessing_num_workers=16,
        dataloader_num_workers=4, output_dir="saves/qwen3-4b/lora/dpo", logging_steps=10,
        save_steps=500, plot_loss=True, save_only_model=False, report_to="none",
        per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate="5.0e-6",
        num_train_epochs=3.0, lr_scheduler_type="cosine", warmup_ratio=0.1, bf16=True,
        ddp_timeout=180000000, resume_from_checkpoint=None,
    )  # fmt: skip
    (source,) = config.data.train
    assert (source.path, source.limit) == (f"{tmp_path}/data/prefs.json", 1000)
    train = config.train
    assert (train.learning_rate, train.global_batch_size, train.warmup_ratio) == (5e-6, 8, 0.1)
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert imported.differs == [
        "template: qwen3_nothink; the tokenizer's own chat template is taken, which is the same "
        "for most instruct models: else name a Jinja file in data.chat_template"
    ]


def test_rows_that_dataset_info_describes(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, dataset="prefs, talks,asked", eval_dataset="prefs")
    sources = [s.model_dump(exclude_defaults=True) for s in config.data.train]
    assert sources == [
        {"path": f"{tmp_path}/data/prefs.json"},
        {"path": "org/talks", "config": "en", "split": "dpo", "limit": 500,
         "columns": {"chosen": "good", "rejected": "bad", "system": "sys"}},
        {"path": f"{tmp_path}/data/asked.json", "columns": {"question": "q"}},
    ]  # fmt: skip
    assert [s.path for s in config.data.eval] == [f"{tmp_path}/data/prefs.json"]
    assert imported.differs == []


def test_rows_that_dataset_info_describes_so_that_something_is_left(tmp_path: Path) -> None:
    odd = {"odd": {
        "ms_hub_url": "a/b", "folder": "f", "formatting": "sharegpt",
        "columns": {"messages": "talk"}, "tags": {"role_tag": "who", "user_tag": "human"},
    }, "asked": {"file_name": "a.json", "ranking": True, "columns": {"prompt": "q", "query": "x"}},
    }  # fmt: skip
    config, imported = convert(tmp_path, odd, dataset="odd,asked")
    assert config.data.train[0].columns == {"prompt": "talk"}
    assert imported.differs == [
        "dataset_info.json: odd.ms_hub_url: a/b; copy it, and name the copy in data.train[0].path",
        "dataset_info.json: odd.ranking: false; its rows have to be pairs, of chosen and rejected",
        "dataset_info.json: odd.folder: f; name its files in data.train[0].path",
        "dataset_info.json: odd.tags.role_tag: who; messages have role and content, or from and "
        "value: rename them in the rows",
        "dataset_info.json: asked.columns.query: x; join it to q in the rows",
    ]


def test_where_dataset_info_lies(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    config, _ = convert(tmp_path, None)
    assert config.data.train[0].path == f"{tmp_path}/prefs.json", "beside the file"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    config, _ = convert(tmp_path, None, dataset_dir=f"{elsewhere}/data")
    assert config.data.train[0].path == f"{elsewhere}/data/prefs.json"
    config, _ = convert(tmp_path, None, dataset_dir="ONLINE", dataset="org/prefs")
    assert config.data.train[0].path == "org/prefs"


def test_without_dataset_info_the_names_stay(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, None)
    assert config.data.train[0].path == "prefs"
    assert imported.differs == [
        f"dataset: dataset_info.json is not in data, {tmp_path}/data, {tmp_path}; put it there, or "
        "write files or hub ids into data.train[].path"
    ]


@pytest.mark.parametrize(("values", "objective"), [
    ({"pref_loss": "ipo", "pref_beta": 0.2}, {"loss": "ipo", "beta": 0.2}),
    ({"pref_loss": "orpo"}, {"loss": "orpo"}), ({"dpo_loss": "hinge"}, {"loss": "hinge"}),
    ({"pref_loss": "simpo", "simpo_gamma": 1.5}, {"loss": "simpo", "simpo_gamma": 1.5}),
    ({"pref_ftx": 0.5}, {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ({"dpo_label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ({"ld_alpha": 0.5}, {"ld_alpha": 0.5}),
    ({"moe_aux_loss_coef": 0.01}, {"router_aux_loss_coef": 0.01}),
])  # fmt: skip
def test_the_objective(tmp_path: Path, values: dict[str, Any], objective: dict[str, Any]) -> None:
    config, imported = convert(tmp_path, **values)
    assert {key: getattr(config.objective, key) for key in objective} == objective
    assert imported.differs == []


def test_an_adapter(tmp_path: Path) -> None:
    config, imported = convert(
        tmp_path, lora_rank=16, lora_alpha=8, lora_dropout=0.1, lora_target="q_proj,v_proj",
        additional_target="lm_head", use_dora=True, quantization_bit=8,
    )  # fmt: skip
    adapter = config.adapter
    assert adapter and (adapter.rank, adapter.alpha, adapter.dropout) == (16, 8.0, 0.0)
    assert adapter.target_modules == ["q_proj", "v_proj"]
    assert adapter.modules_to_save == ["lm_head"] and adapter.use_dora
    assert "LlamaFactory turns dropout off for preferences" in imported.text
    assert imported.differs == ["quantization_bit: 8; model.quantization is nf4, of 4 bits"]
    config, imported = convert(tmp_path, adapter_name_or_path="a,b", quantization_bit=4)
    assert config.adapter and (config.adapter.path, config.adapter.start) == ("b", "continue")
    assert config.model.quantization == "nf4"
    assert imported.differs == ["adapter_name_or_path: a; merge all but the last into model.path"]
    fresh = {"adapter_name_or_path": "a", "create_new_adapter": True}
    config, _ = convert(tmp_path, **fresh)
    assert config.adapter and config.adapter.start == "merge"
    config, imported = convert(tmp_path, finetuning_type="full", lora_rank=8)
    assert config.adapter is None
    assert "#   lora_rank: without effect beside the other keys" in imported.text


def test_held_out_pairs_and_the_rest(tmp_path: Path) -> None:
    config, imported = convert(
        tmp_path, val_size=0.1, eval_strategy="steps", eval_steps=50, early_stopping_steps=3,
        use_muon=True, template="llama3", default_system="Be brief.", flash_attn="fa2",
        disable_gradient_checkpointing=True, deepspeed="ds_z2_config.json", fp16=True,
        add_special_tokens="<a>,<b>", additional_target="embed_tokens,lm_head",
    )  # fmt: skip
    assert (config.data.eval_fraction, config.eval.every_steps) == (0.1, 50)
    assert (config.checkpoint.best_by, config.eval.patience) == ("eval_loss", 3)
    assert (config.train.optimizer, config.train.max_grad_norm) == ("muon", 0.0)
    assert (config.data.chat_template, config.data.system_message) == ("llama3", "Be brief.")
    assert config.model.attention == "flash_attn" and config.train.deepspeed == "zero2"
    assert config.model.add_tokens == ["<a>", "<b>"] and not config.train.gradient_checkpointing
    assert imported.differs == ["fp16: true; float16 needs loss scaling, model.dtype is bfloat16"]
    _, imported = convert(tmp_path, val_size=100)
    assert imported.differs == ["val_size: 100; set data.eval_fraction to 100 / the rows"]


@pytest.mark.parametrize(
    ("given", "warmup", "decay"),
    [
        ({"max_steps": 100, "warmup_steps": 10}, 10, 60),
        ({"max_steps": 100, "warmup_ratio": 0.1}, 10, 60),
        ({"max_steps": 101, "warmup_steps": 10}, 10, 61),
        ({"max_steps": 7}, 0, 5),
        ({"num_train_epochs": 1.0}, 0, 67),
        ({"num_train_epochs": 1.0, "warmup_ratio": 0.1}, 10, 60),
        ({"lr_scheduler_kwargs": {"num_decay_steps": 30}}, 0, 30),
    ],
    ids=str,
)
def test_its_own_length_of_a_decay(
    tmp_path: Path, given: dict[str, Any], warmup: int, decay: int
) -> None:
    """Two thirds of what follows the warm-up, and what is left of a third rounded down."""
    config, imported = convert(tmp_path, lr_scheduler_type="warmup_stable_decay", **given)
    steps = config.train.max_steps or 100
    assert warmup_and_decay(config.train, steps) == (warmup, decay)
    assert imported.differs == []


def test_a_decay_of_a_length_that_is_known_later(tmp_path: Path) -> None:
    _, imported = convert(tmp_path, lr_scheduler_type="warmup_stable_decay", warmup_steps=10)
    assert imported.differs == [
        "lr_scheduler_type: warmup_stable_decay without num_decay_steps; set train.decay_steps to "
        "0.67 of the steps that follow the warm-up, once `dpo-dist plan` shows how many there are"
    ]


VALUES: dict[str, Any] = {
    "stage": "dpo", "finetuning_type": "lora", "lora_target": "q_proj",
    "additional_target": "lm_head", "adapter_name_or_path": "a", "quantization_bit": 4,
    "quantization_method": "bnb", "add_tokens": "<a>", "add_special_tokens": "<a>",
    "flash_attn": "sdpa", "pref_loss": "hinge", "eval_dataset": "prefs", "dataset": "prefs",
    "dataset_dir": "data", "template": "llama3", "ref_model": "r", "default_system": "s",
    "output_dir": "o", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {},
    "optim": "adamw_torch", "deepspeed": "ds_z3_config.json", "save_strategy": "steps",
    "eval_strategy": "steps", "logging_strategy": "steps", "report_to": "wandb",
    "run_name": "n", "metric_for_best_model": "loss", "hub_model_id": "a/b", "hub_revision": "r",
    "lora_target_parameters": ["experts.w"], "model_name_or_path": "m", "model_revision": "v",
}  # fmt: skip
ALONE = {
    "simpo_gamma": {"pref_loss": "simpo"}, "create_new_adapter": {"adapter_name_or_path": "a"},
    "use_muon": {}, "run_name": {"report_to": "wandb"},
    "greater_is_better": {"metric_for_best_model": "rewards/margins"},
    "eval_on_start": {"eval_strategy": "steps"}, "eval_steps": {"eval_strategy": "steps"},
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"),
                    {"push_to_hub": True, "hub_model_id": "a/b"}),
    **dict.fromkeys(("add_tokens", "add_special_tokens"), {"additional_target": "lm_head"}),
    "ld_alpha": {"ld_alpha": 0.5},
    "activation_checkpointing": {"disable_gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("key", [*keys.SAME, *keys.SAME_OF_ADAPTER, *keys.CONVERTED])
def test_every_key_that_is_taken_is_read(tmp_path: Path, key: str) -> None:
    default = keys.LLAMAFACTORY.defaults[key]
    other = not default if isinstance(default, bool) else VALUES.get(key, 1)
    if isinstance(default, float):
        other = 0.25
    given = {"val_size": 0.1, key: other} | ALONE.get(key, {})
    _, imported = convert(tmp_path, **given)
    assert f"#   {key}: without effect" not in imported.text


def test_what_is_not_taken_or_not_needed_is_listed(tmp_path: Path) -> None:
    others = {key: "another" for key in (*keys.DIFFERS, *keys.NOT_NEEDED, *keys.FORMER)}
    text = convert(tmp_path, **others)[1].text
    assert [key for key in others if f"\n#   {key}: " not in text] == []
    defaults = {key: default for key, (default, _) in keys.DIFFERS.items()}
    assert convert(tmp_path, **defaults)[1].differs == []


@pytest.mark.parametrize(("values", "said"), [
    ({"stage": "sft"}, "stage: sft; expected stage: dpo. Train that with LlamaFactory, and give "
     "the result to model.path here."),
    ({"stage": None, "finetuning_type": "lora"}, "LlamaFactory's default of stage: sft; expected "),
    ({"stage": "kto"}, "stage: kto; expected stage: dpo. Labeled rows can be paired: stage=dpo "
     "behind the file, and format: labelled."),
    ({"model_name_or_path": None}, "model_name_or_path is missing; expected the model that "
     "LlamaFactory trained. Put model_name_or_path=MODEL behind the file."),
    ({"finetuning_type": "freeze"}, "finetuning_type: freeze; expected lora or full. Put "
     "finetuning_type=lora behind the file."),
    ({"pref_loss": "kto_pair"}, "pref_loss: kto_pair; expected one of sigmoid, hinge, ipo, orpo, "
     "simpo. Put pref_loss=sigmoid behind the file; objective.loss nca_pair and bco_pair are near "
     "kto_pair."),
    ({"dataset": None}, "dataset is missing; expected the names of the rows that LlamaFactory "
     "read. Put dataset=NAME behind the file."),
    ({"dataset": "nothing"}, "dataset: nothing is not in {folder}/data/dataset_info.json; expected "
     "one of prefs, talks, asked. Correct the name, or add it there."),
    ({"cutof_len": 8}, "has 1 unknown key:\n  cutof_len: unknown key; did you mean cutoff_len?\n"
     "expected keys of LlamaFactory 0.9.5's arguments, or transformers' TrainingArguments. "),
])  # fmt: skip
def test_errors(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, **values)
    said = said.replace("{folder}", str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/llamafactory.yaml")
    assert said in str(caught.value)


def test_a_dataset_info_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match=r"dataset_info.json: Expecting .*; expected JSON. Corr"):
        convert(tmp_path, None)
    (tmp_path / "dataset_info.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"dataset_info.json holds no names; expected \{name: "):
        convert(tmp_path, None)
    columns = {"prefs": INFO["prefs"] | {"columns": {"promt": "q"}}}
    with pytest.raises(ConfigError, match=r"prefs.columns: promt; expected of prompt, query, "):
        convert(tmp_path, columns)
