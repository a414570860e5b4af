"""`dpo-dist import` of Axolotl's YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.commands.import_config import import_config
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ConfigError
from dpo_dist.importing.axolotl import keys
from dpo_dist.importing.run_yaml import Imported

NEEDED = {
    "base_model": "m", "rl": "dpo", "learning_rate": 5e-6,
    "datasets": [{"path": "d/prefs", "type": "chatml.intel"}],
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def convert(folder: Path, **values: Any) -> tuple[RunConfig, Imported]:
    """The run config of an Axolotl YAML with these keys, through a file as a user has it."""
    path = folder / "axolotl.yaml"
    path.write_text(yaml.safe_dump(NEEDED | values))
    imported = import_config(path, (), 1, None)
    (folder / "run.yaml").write_text(imported.text)
    return load_config(folder / "run.yaml"), imported


def source_of(folder: Path, **entry: Any) -> tuple[dict[str, Any], str | None, list[str]]:
    """What the first source has beside its path, the template, and what was not taken."""
    config, imported = convert(folder, datasets=[{"path": "d/prefs"} | entry])
    source = config.data.train[0].model_dump(exclude_defaults=True, exclude={"path"})
    return source, config.data.chat_template, imported.differs


def test_a_key_left_out_has_axolotls_default(tmp_path: Path) -> None:
    config, imported = convert(tmp_path)
    train = config.train
    assert (train.num_epochs, train.lr_schedule, train.warmup_ratio) == (1.0, "cosine", 0.03)
    assert (config.objective.loss, config.objective.beta) == ("sigmoid", 0.1)
    assert (config.data.max_length, train.global_batch_size) == (512, 1)
    assert not train.gradient_checkpointing and config.adapter is None
    assert config.model.dtype == "bfloat16" and imported.differs == []
    assert "beta: 0.1  # Axolotl's default of rl_beta" in imported.text


def test_the_settings_of_a_published_example(tmp_path: Path) -> None:
    """examples/llama-3/instruct-dpo-lora-8b.yml of Axolotl, with its empty keys."""
    config, imported = convert(
        tmp_path, model_type="LlamaForCausalLM", load_in_8bit=True, load_in_4bit=False,
        chat_template="llama3", val_set_size=0.05, sequence_len=4096, sample_packing=False,
        pad_to_sequence_len=True, **LORA, lora_dropout=0.05, lora_model_dir=None,
        datasets=[{
            "path": "d", "type": "chat_template.default", "field_messages": "conversation",
            "field_chosen": "chosen", "field_rejected": "rejected",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
        }],
        wandb_project=None, gradient_accumulation_steps=4, micro_batch_size=2, num_epochs=4,
        optimizer="adamw_bnb_8bit", bf16="auto", tf32=False, gradient_checkpointing=True,
        logging_steps=1, flash_attention=True, warmup_ratio=0.1, evals_per_epoch=4,
        saves_per_epoch=1, weight_decay=0.0, resume_from_checkpoint=None,
    )  # fmt: skip
    (source,) = config.data.train
    assert (source.columns, config.data.chat_template) == ({"prompt": "conversation"}, "llama3")
    assert (config.data.eval_fraction, config.data.max_length) == (0.05, 4096)
    assert config.adapter and (config.adapter.rank, config.adapter.dropout) == (8, 0.0)
    train = config.train
    assert (train.global_batch_size, train.optimizer, train.num_epochs) == (8, "adamw_8bit", 4)
    assert (config.checkpoint.every_steps, config.eval.every_steps) == (0.25, 0.0625)
    assert imported.differs == [
        "load_in_8bit: True; there is no 8-bit base; leave it in model.dtype"
    ]
    assert "#   flash_attention: attention: model.attention auto takes the fastest" in imported.text


ORCA = {"question": "prompt"}
ARGILLA = {"question": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}


@pytest.mark.parametrize(("kind", "columns", "template"), [
    ("chatml.intel", None, "chatml"), ("llama3.icr", {"question": "input"}, "llama3"),
    ("llama3.prompt_pairs", ORCA, "llama3"), ("chatml.ultra", None, "chatml"),
    ("chatml.argilla", ARGILLA, "chatml"), ("llama3.argilla_chat", None, "llama3"),
    ("chat_template.argilla_chat", None, None), ("passthrough", None, None), (None, None, None),
    ({"field_prompt": "q", "field_chosen": "good"}, {"prompt": "q", "chosen": "good"}, None),
])  # fmt: skip
def test_the_rows_of_a_type(tmp_path: Path, kind: Any, columns: Any, template: Any) -> None:
    expected = {"columns": columns} if columns else {}
    assert source_of(tmp_path, type=kind) == (expected, template, [])


def test_a_type_that_leaves_the_columns_open_is_told(tmp_path: Path) -> None:
    source, template, differs = source_of(tmp_path, type="llama3")
    assert (source, template) == ({"columns": ORCA}, "llama3")
    assert differs[0].startswith("datasets.0.type: llama3; data.train[0].columns expects a quest")
    _, _, differs = source_of(tmp_path, type="zephyr.nectar")
    assert differs[0].startswith("datasets.0.type: zephyr.nectar; rows are told by their columns")


def test_dialogues_under_other_names(tmp_path: Path) -> None:
    entry = {"type": "chat_template.default", "field_messages": "talk", "field_chosen": "good",
             "message_field_role": "from", "message_field_content": "value",
             "roles": {"user": ["human"], "assistant": ["gpt"]}}  # fmt: skip
    source, template, differs = source_of(tmp_path, **entry)
    assert source == {"columns": {"prompt": "talk", "chosen": "good"}}
    assert template is None and differs == []
    strange = {"message_property_mappings": {"role": "speaker"}, "roles": {"assistant": ["agent"]}}
    assert source_of(tmp_path, **(entry | strange))[2] == [
        "datasets.0.message_property_mappings: {'role': 'speaker', 'content': 'value'}; messages "
        "have role and content, or from and value: rename them in the rows",
        "datasets.0.roles: agent for assistant; prepare names roles that it does not know: rename "
        "them in the rows",
    ]


def test_formats_of_texts_are_told(tmp_path: Path) -> None:
    kind = {"field_prompt": "q", "prompt_format": "<s>{prompt}", "chosen_format": "{chosen}"}
    assert source_of(tmp_path, type=kind)[2] == [
        "datasets.0.type.prompt_format: '<s>{prompt}'; write that text into the rows, or leave it "
        "to a chat template: columns {question: ...} makes dialogues of them"
    ]


def test_where_the_rows_lie(tmp_path: Path) -> None:
    placed = {"name": "en", "split": "train_prefs", "revision": "v1"}
    source, _, _ = source_of(tmp_path, **placed)
    assert source == {"config": "en", "split": "train_prefs", "revision": "v1"}
    files = {"path": "json", "ds_type": "json", "data_files": ["a.jsonl"]}
    config, imported = convert(tmp_path, datasets=[files])
    assert config.data.train[0].path == "a.jsonl" and imported.differs == []
    config, imported = convert(tmp_path, datasets=[files | {"data_files": ["a.jsonl", "b.jsonl"]}])
    assert imported.differs == [
        "datasets.0.data_files: b.jsonl; a source is a file, a folder or a hub id: name the files "
        "in sources of their own, such as data.train[0].path"
    ]
    _, imported = convert(tmp_path, datasets=[{"path": "s3://b/rows"}], streaming=True)
    assert imported.differs[0].startswith("datasets.0.path: s3://b/rows; copy it")


def test_held_out_pairs(tmp_path: Path) -> None:
    rows = [{"path": "t", "split": "test", "type": "chatml.intel"}]
    config, _ = convert(tmp_path, test_datasets=rows, eval_steps=0.1, early_stopping_patience=3)
    assert [(s.path, s.split) for s in config.data.eval] == [("t", "test")]
    assert (config.eval.every_steps, config.eval.patience) == (0.1, 3)
    assert (config.checkpoint.best_by, config.checkpoint.every_steps) == ("eval_loss", 0.1)
    _, imported = convert(tmp_path, val_set_size=200)
    assert imported.differs == ["val_set_size: 200; set data.eval_fraction to 200 / the rows"]


@pytest.mark.parametrize(("values", "objective"), [
    ({"rl": "ipo", "rl_beta": 0.2}, {"loss": "ipo", "beta": 0.2}),
    ({"dpo_beta": 0.3}, {"beta": 0.3}), ({"trl": {"beta": 0.4}}, {"beta": 0.4}),
    ({"rl": "orpo", "orpo_alpha": 0.5}, {"loss": "orpo", "beta": 0.5}),
    ({"rl": "simpo", "cpo_alpha": 0, "simpo_gamma": 1.0}, {"loss": "simpo", "simpo_gamma": 1.0}),
    ({"rl": "simpo"}, {"loss": ["simpo", "sft"], "loss_weights": [1.0, 1.0]}),
    ({"rpo_alpha": 0.5}, {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ({"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 2]},
     {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}),
    ({"dpo_label_smoothing": 0.1, "dpo_loss_type": ["robust"]},
     {"loss": "robust", "label_smoothing": 0.1}),
    ({"dpo_use_weighting": True}, {"use_weighting": True}),
])  # fmt: skip
def test_the_objective(tmp_path: Path, values: dict[str, Any], objective: dict[str, Any]) -> None:
    config, imported = convert(tmp_path, **values)
    assert {key: getattr(config.objective, key) for key in objective} == objective
    assert imported.differs == []


def test_smoothing_is_taken_where_a_loss_reads_it(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, dpo_label_smoothing=0.1)
    assert config.objective.label_smoothing == 0.1 and imported.differs == []
    config, imported = convert(tmp_path, dpo_label_smoothing=0.1, rl="ipo")
    assert config.objective.label_smoothing == 0
    assert imported.differs == ["dpo_label_smoothing: 0.1; ipo does not read it"]


def test_an_adapter(tmp_path: Path) -> None:
    pattern = {"lora_target_linear": False, "lora_target_modules": r".*\.q_proj"}
    adapter = convert(tmp_path, **(LORA | pattern), peft_use_rslora=True)[0].adapter
    assert adapter and (adapter.target_modules, adapter.use_rslora) == (r".*\.q_proj", True)
    config, imported = convert(
        tmp_path, adapter="qlora", load_in_4bit=True, lora_model_dir="sft", lora_r=8
    )
    assert config.model.quantization == "nf4" and config.adapter
    assert config.adapter.path == "sft"
    assert "#   lora_r: without effect beside the other keys" in imported.text


def test_the_batch(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, micro_batch_size=2, batch_size=16)
    assert config.train.global_batch_size == 16
    assert imported.arithmetic.startswith("micro_batch_size 2 x gradient_accumulation_steps 8 x ")
    ray = convert(tmp_path, use_ray=True, ray_num_workers=4)[0]
    assert ray.train.global_batch_size == 1, "what the command line says comes first"


def test_logs_and_the_hub(tmp_path: Path) -> None:
    config, imported = convert(
        tmp_path, wandb_project="p", wandb_name="n", use_tensorboard=True, hub_model_id="me/m",
        save_steps=50, save_total_limit=3, cosine_min_lr_ratio=0.1, max_steps=100, warmup_steps=7,
        generate_samples=True, val_set_size=0.1,
    )  # fmt: skip
    logging, export = config.logging, config.export
    assert (logging.wandb, logging.wandb_project, logging.wandb_name) == (True, "p", "n")
    assert (export.push_to_hub, export.hub_private) == ("me/m", True)
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (50, 3)
    assert (config.train.min_lr_rate, config.train.warmup_steps) == (0.1, 7)
    assert config.eval.samples_every_steps == 100 and imported.differs == []


def test_a_schedule_that_decays_at_the_end_of_axolotl(tmp_path: Path) -> None:
    kwargs = {"num_decay_steps": 20, "decay_type": "linear"}
    config, imported = convert(
        tmp_path, lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs=kwargs, warmup_steps=5
    )
    train = config.train
    assert (train.lr_schedule, train.warmup_steps, train.decay_steps) == ("wsd", 5, 20)
    assert train.decay_shape == "linear" and imported.differs == []


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    chat = [{"path": "d", "type": "chat_template.default"}]
    config, _ = convert(tmp_path, datasets=chat, chat_template="jinja",
                        chat_template_jinja="ours.jinja")  # fmt: skip
    assert config.data.chat_template == "ours.jinja"
    written = {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"}
    assert convert(tmp_path, datasets=chat, **written)[1].differs == [
        "chat_template_jinja: its text; save it as a file and name that in data.chat_template"
    ]
    assert (
        convert(tmp_path, datasets=chat, chat_template="gemma")[1]
        .differs[0]
        .startswith("chat_template: gemma; the tokenizer's own is taken")
    )
    both = [*chat, {"path": "e", "type": "chatml.intel"}]
    assert convert(tmp_path, datasets=both, chat_template="llama3")[1].differs == [
        "datasets.type: templates chatml, llama3; a run has one, data.chat_template"
    ]


VALUES: dict[str, Any] = {
    "rl": "dpo", "trl": {"beta": 0.2}, "dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [1.0],
    "bf16": True, "adapter": "lora", "lora_target_modules": ["q_proj"],
    "lora_target_parameters": ["experts.w"], "lora_modules_to_save": ["lm_head"],
    "test_datasets": [{"path": "t"}], "excess_length_strategy": "truncate",
    "chat_template": "chatml", "chat_template_jinja": "a.jinja", "tokens": ["<a>"],
    "lr_scheduler": "cosine", "lr_scheduler_kwargs": {}, "optimizer": "adamw_torch",
    "save_strategy": "steps", "eval_strategy": "steps", "metric_for_best_model": "loss",
    "use_wandb": True, "hub_model_id": "a/b", "default_system_message": "s",
    "chat_template_kwargs": {"a": 1}, "revision_of_model": "r", "dataset_num_proc": 2,
    "lora_model_dir": "sft", "output_dir": "o", "deepspeed": "zero3.json",
}  # fmt: skip
ALONE = {
    "simpo_gamma": {"rl": "simpo"}, "cpo_alpha": {"rl": "simpo"}, "orpo_alpha": {"rl": "orpo"},
    "dpo_loss_weights": {"dpo_loss_type": ["sigmoid"]},
    "lora_target_modules": {"lora_target_linear": None},
    "load_in_4bit": {"adapter": "qlora"}, "tokens": {"lora_modules_to_save": ["lm_head"]},
    "hub_revision": {"hub_model_id": "a/b"}, "wandb_name": {"wandb_project": "p"},
    "greater_is_better": {"metric_for_best_model": "rewards/margins"},
    "dpo_label_smoothing": {"dpo_loss_type": ["robust"]}, "cosine_min_lr_ratio": {},
}  # fmt: skip


@pytest.mark.parametrize("key", [*keys.SAME, *keys.SAME_OF_ADAPTER, *keys.CONVERTED])
def test_every_key_that_is_taken_is_read(tmp_path: Path, key: str) -> None:
    default = keys.AXOLOTL.defaults[key]
    other = not default if isinstance(default, bool) else VALUES.get(key, 1)
    if isinstance(default, float):
        other = 0.25
    given = {"val_set_size": 0.1} | LORA | ALONE.get(key, {})
    if key not in NEEDED:
        given |= {key: other}
    if key in ("test_datasets",):
        given.pop("val_set_size")
    _, imported = convert(tmp_path, **given)
    assert f"#   {key}: without effect" not in imported.text


def test_what_is_not_taken_or_not_needed_is_listed(tmp_path: Path) -> None:
    others = {key: "another" for key in (*keys.DIFFERS, *keys.NOT_NEEDED, *keys.FORMER)}
    text = convert(tmp_path, **others)[1].text
    assert [key for key in others if f"\n#   {key}: " not in text] == []
    empty = dict.fromkeys(others)
    assert convert(tmp_path, **empty)[1].differs == []


@pytest.mark.parametrize(("values", "said"), [
    ({"rl": None}, "there is no rl: the file is of supervised fine-tuning; expected rl: dpo, ipo, "
     "simpo, orpo. Train that with Axolotl, and give the result to model.path here."),
    ({"rl": "grpo"}, "rl: grpo; expected one of dpo, ipo, simpo, orpo. Train that with Axolotl."),
    ({"rl": "kto"}, "rl: kto; expected one of dpo, ipo, simpo, orpo. Labeled rows can be paired: "
     "rl=dpo behind the file, and format: labelled here."),
    ({"learning_rate": None}, "learning_rate is missing; expected it, as Axolotl does. Put "
     "learning_rate=VALUE behind the file."),
    ({"adapter": "lora"}, "adapter: lora without lora_r; expected lora_r and lora_alpha. Put "
     "lora_r=NUMBER behind the file."),
    ({"adapter": "llama-adapter"}, "adapter: llama-adapter; expected lora or qlora. Change it, or "
     "leave it out."),
    ({"datasets": "d"}, "datasets: 'd'; expected a list of mappings of path, name, split, "),
    ({"datasets": [{"pth": "d"}]}, "datasets.0: pth; expected a path, and of path, name, split, "),
    ({"datasets": [{"split": "train"}]}, "datasets.0: no path; expected a path, and of path, "),
    ({"micro_batch_size": 3, "batch_size": 8}, "batch_size: 8; expected a multiple of "
     "micro_batch_size 3. Correct the YAML."),
    ({"sequence_length": 8}, "has 1 unknown key:\n  sequence_length: unknown key; did you mean "
     "sequence_len?\nexpected keys of Axolotl's config reference. Correct the lines "),
])  # fmt: skip
def test_errors(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, **values)
    assert str(caught.value).startswith(f"{tmp_path}/axolotl.yaml") and said in str(caught.value)
