"""`dpo-dist import-trl`: every key of TRL is known, and the result is a run config."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from support.commands import dpo_dist, succeed

from dpo_dist.commands.import_config import import_config
from dpo_dist.config.objective_section import REFERENCE_FREE, LossName
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ConfigError
from dpo_dist.importing.run_yaml import Imported
from dpo_dist.importing.trl import convert as convert_module
from dpo_dist.importing.trl import keys

NEEDED = {"model_name_or_path": "m", "dataset_name": "d/prefs", "output_dir": "out"}
TABLES = (keys.SAME, keys.SAME_OF_ADAPTER, keys.CONVERTED, keys.DIFFERS, keys.NOT_NEEDED)


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "trl.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def convert(
    folder: Path, *, processes: int | None = 1, **values: Any
) -> tuple[RunConfig, Imported]:
    """The run config of a TRL YAML with these keys, through a file as a user has it."""
    imported = import_config(write(folder, NEEDED | values), (), processes, None, "TRL")
    (folder / "run.yaml").write_text(imported.text)
    return load_config(folder / "run.yaml"), imported


def fields_of_trl() -> dict[str, Any]:
    from trl import DPOConfig, ModelConfig, ScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for owner in (DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
        for field in dataclasses.fields(owner)
    }


def test_every_field_of_trl_has_one_entry() -> None:
    known = [key for table in TABLES for key in table if key not in keys.FORMER_CONVERTED]
    assert sorted(known) == sorted(fields_of_trl())


def test_defaults_are_trls() -> None:
    fields = fields_of_trl()
    fields["loss_type"] = ["sigmoid"]
    ours = {key: default for key, default in keys.TRL.defaults.items() if key in fields}
    ours |= {key: default for key, (default, _) in keys.DIFFERS.items()}
    enums = {key: getattr(value, "value", value) for key, value in fields.items()}
    assert {k: (v, enums[k]) for k, v in ours.items() if v != enums[k]} == {}


def test_former_keys_are_gone_from_trl() -> None:
    former = {*keys.RENAMED, *keys.FORMER, *keys.FORMER_CONVERTED}
    assert not former & set(fields_of_trl())


def test_a_key_left_out_has_trls_default(tmp_path: Path) -> None:
    config, imported = convert(tmp_path)
    train = config.train
    assert (train.learning_rate, train.num_epochs, train.lr_schedule) == (1e-6, 3.0, "linear")
    assert (train.warmup_ratio, config.data.max_length) == (0.0, 1024)
    assert (train.global_batch_size, train.micro_batch_tokens) == (8, 8 * 2 * 1024)
    assert config.adapter is None and not config.data.eval and imported.differs == []
    assert "learning_rate: 1.0e-06  # TRL's default of learning_rate" in imported.text


@pytest.mark.parametrize("key", [*keys.SAME, *keys.SAME_OF_ADAPTER])
def test_copied_keys_arrive(tmp_path: Path, key: str) -> None:
    ours, default = (keys.SAME | keys.SAME_OF_ADAPTER)[key]
    others = {
        "loss_weights": [2.0], "f_divergence_type": "js_divergence",
        "lora_target_parameters": ["mlp.experts.down_proj"],
    }  # fmt: skip
    beside = {
        "discopop_tau": {"loss_type": "discopop"},
        "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    }
    if key in others:
        other: Any = others[key]
    elif isinstance(default, bool):
        other = not default
    else:
        other = (default or 0.02) / 2
    if isinstance(default, int) and not isinstance(default, bool):
        other = int(other)
    config, _ = convert(tmp_path, use_peft=True, **beside.get(key, {}), **{key: other})
    section, name = ours.split(".")
    assert getattr(getattr(config, section), name) == other


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "trl.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\nbeta: '0.2'\n")
    config = yaml.safe_load(import_config(path, (), 1, None, "TRL").text)
    assert (config["train"]["learning_rate"], config["objective"]["beta"]) == (5e-7, 0.2)


def test_the_batch_with_its_arithmetic(tmp_path: Path) -> None:
    config, imported = convert(
        tmp_path, processes=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_length=512,
    )  # fmt: skip
    assert (config.train.global_batch_size, config.train.micro_batch_tokens) == (64, 4096)
    assert imported.arithmetic == (
        "per_device_train_batch_size 4 x gradient_accumulation_steps 2 x num_processes 8 = "
        "train.global_batch_size 64"
    )
    assert "  # 4 a device x 2 accumulated x 8 processes" in imported.text


def test_an_accelerate_config(tmp_path: Path) -> None:
    accelerate = tmp_path / "accelerate.yaml"
    launcher = {"zero_stage": 3, "offload_optimizer_device": "cpu"}
    accelerate.write_text(yaml.safe_dump({"num_processes": 16, "deepspeed_config": launcher}))
    imported = import_config(write(tmp_path, NEEDED), (), None, accelerate, "TRL")
    train = yaml.safe_load(imported.text)["train"]
    assert (train["global_batch_size"], train["deepspeed"]) == (128, "zero3_offload")


@pytest.mark.parametrize(("given", "sharding"), [
    ({"zero_optimization": {"stage": 2}}, "zero2"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "zero3_offload"),
    ({}, "zero0"),
])  # fmt: skip
def test_a_deepspeed_config(tmp_path: Path, given: dict[str, Any], sharding: str) -> None:
    assert convert(tmp_path, deepspeed=given)[0].train.deepspeed == sharding


def test_an_adapter(tmp_path: Path) -> None:
    config, imported = convert(
        tmp_path, use_peft=True, lora_r=8, lora_alpha=64, lora_dropout=0.1, use_rslora=True,
        lora_modules_to_save=["lm_head"],
    )  # fmt: skip
    adapter = config.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.use_rslora) == (8, 64, True)
    assert (adapter.target_modules, adapter.modules_to_save) == (["q_proj", "v_proj"], ["lm_head"])
    assert adapter.dropout == 0  # TRL turns LoRA's dropout off with the model's
    assert "lora_dropout is 0.1, but TRL's disable_dropout is true" in imported.text
    kept = convert(tmp_path, use_peft=True, lora_dropout=0.1, disable_dropout=False)[0].adapter
    every = convert(tmp_path, use_peft=True, lora_target_modules=["all-linear"])[0].adapter
    assert kept and kept.dropout == 0.1 and every and every.target_modules == "all-linear"


def test_trl_turns_the_dropout_of_an_adapter_off() -> None:
    """What the conversion of lora_dropout rests on."""
    import peft
    from support.tiny_models import tiny_model
    from trl.trainer.utils import disable_dropout_in_model

    model: Any = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    )
    disable_dropout_in_model(model)
    assert "p=0.5" not in str(model) and "p=0" in str(model)


def test_pefts_own_targets() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    families = ("llama", "mistral", "mixtral", "gemma", "gemma2", "qwen2", "qwen3")
    assert {tuple(TARGETS[family]) for family in families} == {("q_proj", "v_proj")}


def test_steps_and_warm_up(tmp_path: Path) -> None:
    config, _ = convert(tmp_path, max_steps=200, warmup_steps=50, lr_scheduler_type="cosine")
    assert (config.train.max_steps, config.train.warmup_steps) == (200, 50)
    assert config.train.warmup_ratio is None
    assert config.train.num_epochs == 1000  # TRL repeats the data until then
    assert convert(tmp_path, warmup_steps=0.1)[0].train.warmup_ratio == 0.1
    assert convert(tmp_path, warmup_ratio=0.2)[0].train.warmup_ratio == 0.2
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0.3}
    assert convert(tmp_path, **constant)[0].train.warmup_ratio == 0
    counted, imported = convert(tmp_path, warmup_steps=100, warmup_ratio=0.2)
    assert counted.train.warmup_steps == 100 and imported.differs == []
    assert "#   warmup_ratio: without effect beside the other keys" in imported.text
    _, other = convert(tmp_path, lr_scheduler_type="reduce_lr_on_plateau")
    assert other.differs[0].startswith("lr_scheduler_type: reduce_lr_on_plateau; train.lr_schedule")


def test_a_cosine_that_ends_above_zero(tmp_path: Path) -> None:
    named = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 2e-6}
    config, imported = convert(tmp_path, **named, lr_scheduler_kwargs={"min_lr_rate": 0.1})
    assert (config.train.lr_schedule, config.train.min_lr_rate) == ("cosine", 0.1)
    assert imported.differs == []
    absolute, _ = convert(tmp_path, **named, lr_scheduler_kwargs='{"min_lr": 5e-7}')
    assert absolute.train.min_lr_rate == 0.25
    other = {"min_lr_rate": 0.1, "num_cycles": 2}
    ahead = {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": other}
    assert convert(tmp_path, **ahead)[1].differs == [
        "lr_scheduler_type: cosine_warmup_with_min_lr; train.lr_schedule cosine is the same curve "
        "a step later, which begins at 0",
        "lr_scheduler_kwargs.num_cycles: 2; train.lr_schedule has no such setting",
    ]
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, **named)
    assert str(caught.value) == (
        f"{tmp_path}/trl.yaml: lr_scheduler_type: cosine_with_min_lr without a rate to end at; "
        "expected min_lr_rate or min_lr in lr_scheduler_kwargs. Put "
        "lr_scheduler_kwargs={min_lr_rate: 0.1} behind the file."
    )
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs: 3; expected a mapping, such as"):
        convert(tmp_path, lr_scheduler_kwargs=3)
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs.min_lr_rate: 'x'; expected a numb"):
        convert(tmp_path, **named, lr_scheduler_kwargs={"min_lr_rate": "x"})


def test_a_schedule_that_decays_at_the_end(tmp_path: Path) -> None:
    named = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 10}
    kwargs = {"num_decay_steps": 60, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}
    as_here = {"warmup_type": "linear", "num_cycles": 0.5}
    config, imported = convert(tmp_path, **named, lr_scheduler_kwargs=kwargs | as_here)
    train = config.train
    assert (train.lr_schedule, train.warmup_steps, train.decay_steps) == ("wsd", 10, 60)
    assert (train.decay_shape, train.min_lr_rate) == ("1-sqrt", 0.1)
    assert imported.differs == []
    others = {"num_decay_steps": 60, "warmup_type": "cosine", "num_stable_steps": 5}
    assert convert(tmp_path, **named, lr_scheduler_kwargs=others)[1].differs == [
        "lr_scheduler_kwargs.num_stable_steps: 5; wsd is stable until train.decay_steps are left, "
        "which is the same where warmup, stable and decay add up to all steps",
        "lr_scheduler_kwargs.warmup_type: cosine; train.lr_schedule has no such setting",
    ]
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, **named)
    assert str(caught.value) == (
        f"{tmp_path}/trl.yaml: lr_scheduler_type: warmup_stable_decay without steps to decay in; "
        "expected num_decay_steps in lr_scheduler_kwargs. Put "
        "lr_scheduler_kwargs={num_decay_steps: 100} behind the file."
    )


@pytest.mark.parametrize(("given", "targets"), [
    ("all-linear", "all-linear"), (["all-linear"], "all-linear"), ("q_proj", ["q_proj"]),
    (["q_proj"], ["q_proj"]), (["q_proj", "o_proj"], ["q_proj", "o_proj"]),
    (r".*\.(q|v)_proj", r".*\.(q|v)_proj"), ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
])  # fmt: skip
def test_targets_of_an_adapter(tmp_path: Path, given: Any, targets: Any) -> None:
    adapter = convert(tmp_path, use_peft=True, lora_target_modules=given)[0].adapter
    assert adapter is not None and adapter.target_modules == targets


@pytest.mark.parametrize(("name", "sharding"), [
    ("ds_z3_config.json", "zero3"), ("zero3_bf16.json", "zero3"), ("zero2.json", "zero2"),
    ("ds_z3_offload_config.json", "zero3_offload"), ("deepspeed_zero1.yaml", "zero1"),
])  # fmt: skip
def test_a_deepspeed_file_that_is_not_here_tells_by_its_name(
    tmp_path: Path, name: str, sharding: str
) -> None:
    config, imported = convert(tmp_path, deepspeed=f"elsewhere/{name}")
    assert config.train.deepspeed == sharding and imported.differs == []
    assert f"deepspeed: {name} by its name, as it is not here: stage" in imported.text
    _, unknown = convert(tmp_path, deepspeed="elsewhere/ours.json")
    assert unknown.differs[0].startswith("deepspeed: elsewhere/ours.json cannot be read from here")


@pytest.mark.parametrize(("given", "dtype"), [
    ({}, "bfloat16"), ({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32"),
    ({"fp16": True}, "bfloat16"), ({"bf16": False, "dtype": "bfloat16"}, "bfloat16"),
    ({"bf16": False, "torch_dtype": "bfloat16"}, "bfloat16"),
])  # fmt: skip
def test_precision(tmp_path: Path, given: dict[str, Any], dtype: str) -> None:
    config, imported = convert(tmp_path, **given)
    assert config.model.dtype == dtype
    assert bool(imported.differs) == ("fp16" in given)


def test_data_and_evaluation(tmp_path: Path) -> None:
    config, _ = convert(
        tmp_path, dataset_train_split="train_prefs", dataset_test_split="test_prefs",
        dataset_config="default", eval_strategy="steps", eval_steps=50,
    )  # fmt: skip
    (train,), (held_out,) = config.data.train, config.data.eval
    assert not config.eval.on_start
    on_start = {"eval_strategy": "steps", "eval_on_start": True}
    assert convert(tmp_path, **on_start)[0].eval.on_start
    assert (train.path, train.config, train.split) == ("d/prefs", "default", "train_prefs")
    assert (held_out.split, config.eval.every_steps) == ("test_prefs", 50)


def test_a_mixture(tmp_path: Path) -> None:
    mixture = [
        {"path": "a/b", "name": "c", "split": "train_prefs", "fraction": 0.5, "columns": ["x"]},
        {"path": "json", "data_files": "rows.jsonl", "fraction": 0.5},
        {"path": "d/e", "data_dir": "data/rl", "fraction": 0.5},
    ]
    config, imported = convert(tmp_path, dataset_name=None, datasets=mixture)
    assert [(s.path, s.config, s.split) for s in config.data.train] == [
        ("a/b", "c", "train_prefs"), ("rows.jsonl", None, "train"), ("d/e", None, "train"),
    ]  # fmt: skip
    assert sum("fraction" in note for note in imported.differs) == 3
    assert any(note.startswith("datasets.2.data_dir: data/rl") for note in imported.differs)
    with pytest.raises(ConfigError, match=r"datasets.0: pth; expected a path, and of path, name"):
        convert(tmp_path, datasets=[{"pth": "a"}])


HANDBOOK = {
    "datasets": [
        {"id": "a/b", "config": "c", "split": "train_prefs", "columns": ["chosen", "rejected"],
         "weight": 0.5},
        {"id": "d/e"},
    ],
}  # fmt: skip


def test_the_handbooks_mixture(tmp_path: Path) -> None:
    given: dict[str, Any] = {"dataset_name": None, "eval_strategy": "steps"}
    mixture = HANDBOOK | {"test_split_size": 0.05, "seed": 3}
    config, imported = convert(tmp_path, dataset_mixture=mixture, **given)
    assert [(s.path, s.config, s.split, s.weight) for s in config.data.train] == [
        ("a/b", "c", "train_prefs", 0.5), ("d/e", None, "train", 1.0),
    ]  # fmt: skip
    assert (config.data.eval_fraction, config.data.eval_seed) == (0.05, 3)
    assert imported.differs == []
    rows, imported = convert(tmp_path, dataset_mixture=HANDBOOK | {"test_split_size": 900}, **given)
    assert rows.data.eval_fraction == 0 and imported.differs == [
        "dataset_mixture.test_split_size: 900; set data.eval_fraction to 900 / the rows of the "
        "mixture"
    ]
    unread, _ = convert(tmp_path, dataset_name=None, dataset_mixture=mixture)
    assert unread.data.eval_fraction == 0, "nothing is evaluated"


def test_the_mixer_of_earlier_handbooks(tmp_path: Path) -> None:
    mixer = {"HuggingFaceH4/ultrafeedback_binarized": 1.0, "x/y": 0.25}
    config, imported = convert(
        tmp_path, dataset_name=None, dataset_mixer=mixer, evaluation_strategy="steps",
        dataset_splits=["train_prefs", "test_prefs"],
    )  # fmt: skip
    assert [(s.path, s.split, s.weight) for s in config.data.train] == [
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", 1.0), ("x/y", "train_prefs", 0.25),
    ]  # fmt: skip
    assert [(s.path, s.split) for s in config.data.eval] == [
        ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"), ("x/y", "test_prefs"),
    ]  # fmt: skip
    assert imported.differs == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_mixture": {"datasets": []}},
         "dataset_mixture: {'datasets': []}; expected datasets, a list of id, config, split, "
         "columns, weight. Correct the YAML."),
        ({"dataset_mixture": {"datasets": [{"id": "a", "splt": "b"}]}},
         "dataset_mixture.datasets.0: splt; expected an id, and of id, config, split, columns, "
         "weight. Correct the YAML."),
        ({"dataset_mixer": ["a"]},
         "dataset_mixer: ['a']; expected {data set: share}. Correct the YAML."),
    ],
)  # fmt: skip
def test_a_handbooks_data_that_cannot_be_read(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, dataset_name=None, **values)
    assert str(caught.value) == f"{tmp_path}/trl.yaml: {message}"


def test_streaming_and_a_share_held_out(tmp_path: Path) -> None:
    streamed = convert(tmp_path, dataset_streaming=True, eval_strategy="steps")[0].data
    assert streamed.train[0].streaming and streamed.eval[0].streaming
    mixture = {"dataset_name": None, "datasets": [{"path": "a/b"}], "streaming": True}
    config, _ = convert(tmp_path, **mixture, test_split_size=0.1, eval_strategy="steps")
    assert config.data.train[0].streaming and config.data.eval_fraction == 0.1


@pytest.mark.parametrize(("optim", "optimizer"), [
    ("adamw_torch", "adamw"), ("adamw_8bit", "adamw_8bit"), ("adamw_bnb_8bit", "adamw_8bit"),
    ("paged_adamw_32bit", "paged_adamw"), ("paged_adamw_8bit", "paged_adamw_8bit"),
    ("adafactor", "adafactor"),
])  # fmt: skip
def test_optimizers(tmp_path: Path, optim: str, optimizer: str) -> None:
    assert convert(tmp_path, optim=optim)[0].train.optimizer == optimizer


def test_an_optimizer_that_is_not_there(tmp_path: Path) -> None:
    assert convert(tmp_path, optim="lomo")[1].differs == ["optim: lomo; train.optimizer is adamw"]


def test_a_4_bit_base(tmp_path: Path) -> None:
    config, _ = convert(tmp_path, use_peft=True, load_in_4bit=True)
    assert config.model.quantization == "nf4"


def test_checkpoints_and_logging(tmp_path: Path) -> None:
    config, _ = convert(
        tmp_path, save_steps=0.25, max_steps=40, save_total_limit=1, logging_steps=5,
        report_to=["tensorboard", "wandb"],
    )  # fmt: skip
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (0.25, 2)
    assert (config.logging.every_steps, config.logging.tensorboard) == (5, True)
    config, imported = convert(tmp_path, save_strategy="epoch", num_train_epochs=4)
    assert (config.checkpoint.every_steps, imported.differs) == (0.25, [])
    _, imported = convert(tmp_path, save_strategy="no", logging_strategy="strange")
    assert "#   save_strategy: no: a run always ends with a checkpoint" in imported.text
    assert imported.differs == [
        "logging_strategy: strange; logging.every_steps counts steps, or is a share of all"
    ]


def held_out(folder: Path, **values: Any) -> tuple[RunConfig, Imported]:
    steps = {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 100}
    return convert(folder, **steps | values)


def test_the_best_checkpoint(tmp_path: Path) -> None:
    config, imported = held_out(tmp_path, load_best_model_at_end=True)
    assert (config.checkpoint.best_by, config.export.checkpoint) == ("eval_loss", "auto")
    reason = "  # TRL's default of metric_for_best_model; export takes that checkpoint"
    assert f"best_by: eval_loss{reason}" in imported.text
    assert imported.differs == []
    kept, _ = held_out(tmp_path, metric_for_best_model="rewards/margins")
    assert (kept.checkpoint.best_by, kept.export.checkpoint) == ("eval_rewards/margins", "newest")
    best, imported = held_out(tmp_path, save_strategy="best")
    assert (best.checkpoint.best_by, best.checkpoint.every_steps) == ("eval_loss", 50)
    assert imported.differs == []


@pytest.mark.parametrize(("values", "said"), [
    ({"eval_strategy": "no"}, "TRL's default of metric_for_best_model: nothing is held out; che"),
    ({"metric_for_best_model": "logps/chosen"}, "metric_for_best_model: logps/chosen; checkpoint."
     "best_by is one of eval_loss, eval_rewards/accuracies, eval_rewards/margins"),
    ({"greater_is_better": True}, "greater_is_better: True; checkpoint.best_by takes the lowest "
     "eval_loss, so none is chosen by it"),
])  # fmt: skip
def test_a_best_checkpoint_that_is_not_chosen(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    config, imported = held_out(tmp_path, load_best_model_at_end=True, **values)
    assert config.checkpoint.best_by is None
    assert imported.differs[0].startswith(said)


def test_answers_while_training(tmp_path: Path) -> None:
    config, imported = held_out(tmp_path, generate_during_eval=True)
    assert config.eval.samples_every_steps == 50 and imported.differs == []
    none, imported = convert(tmp_path, generate_during_eval=True)
    assert none.eval.samples_every_steps is None
    assert imported.differs[0].startswith("generate_during_eval: nothing is held out")


def test_weights_and_biases(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, report_to=["wandb", "mlflow"], run_name="one")
    logging = config.logging
    assert (logging.wandb, logging.wandb_name, logging.tensorboard) == (True, "one", False)
    assert "#   report_to: mlflow can read run.dir/metrics.jsonl" in imported.text


def test_the_hub(tmp_path: Path) -> None:
    hub = {"push_to_hub": True, "hub_model_id": "me/dpo"}
    export = convert(tmp_path, **hub)[0].export
    assert (export.push_to_hub, export.hub_private, export.hub_revision) == ("me/dpo", True, None)
    export = convert(tmp_path, **hub, hub_private_repo=False, hub_revision="v1")[0].export
    assert (export.hub_private, export.hub_revision) == (False, "v1")
    assert convert(tmp_path, hub_model_id="me/dpo")[0].export.push_to_hub is None
    for name, found in ((None, "without hub_model_id"), ("dpo", "with hub_model_id dpo")):
        _, imported = convert(tmp_path, push_to_hub=True, hub_model_id=name)
        assert imported.differs == [
            f"push_to_hub: {found}; set export.push_to_hub to OWNER/{name or 'NAME'}, where OWNER "
            "is your account or organization (TRL takes the account of the token)"
        ]


def test_the_loss_and_its_smoothing(tmp_path: Path) -> None:
    assert convert(tmp_path, loss_type="ipo")[0].objective.loss == "ipo"
    assert convert(tmp_path, loss_type=["hinge"])[0].objective.loss == "hinge"
    mixed = convert(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5])[0].objective
    assert mixed.loss == ["sigmoid", "sft"] and mixed.loss_weights == [1, 0.5]
    terms = convert(tmp_path, ld_alpha=0.5, router_aux_loss_coef=0.01, gradient_checkpointing=False)
    assert (terms[0].objective.ld_alpha, terms[0].objective.router_aux_loss_coef) == (0.5, 0.01)
    robust = convert(tmp_path, loss_type="robust", label_smoothing=0.1)[0].objective
    assert (robust.loss, robust.label_smoothing) == ("robust", 0.1)
    config, imported = convert(tmp_path, label_smoothing=0.1)
    assert config.objective.label_smoothing == 0  # as in TRL, whose sigmoid does not read it
    assert imported.differs[0].startswith("label_smoothing: 0.1; TRL reads it for robust, exo_")


@pytest.mark.parametrize("loss", convert_module.SMOOTHED_IN_TRL)
def test_smoothing_arrives_where_trl_reads_it(tmp_path: Path, loss: str) -> None:
    config, imported = convert(tmp_path, loss_type=loss, label_smoothing=0.1)
    assert config.objective.label_smoothing == 0.1 and imported.differs == []


def test_trl_smooths_these_losses_and_no_other(tmp_path: Path) -> None:
    """What the conversion of label_smoothing rests on."""
    from support.oracles.against_trl import trl_batch

    trainer, batch = trl_batch(tmp_path, 6)
    smoothed = []
    for name in set(get_args(LossName)) - {*REFERENCE_FREE}:
        trainer.loss_types, losses = [name], set[float]()
        for trainer.label_smoothing in (0.1, 0.2):
            losses.add(trainer.compute_loss(trainer.model, batch).item())
        smoothed += [name] * (len(losses) - 1)
    assert sorted(smoothed) == sorted(convert_module.SMOOTHED_IN_TRL)


def test_smoothing_of_a_mix_is_told(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, loss_type=["sigmoid", "robust"], label_smoothing=0.1)
    assert config.objective.label_smoothing == 0.1
    assert imported.differs == [
        "label_smoothing: 0.1; objective.label_smoothing smooths sigmoid too, TRL does not; there "
        "is no key for one loss of several"
    ]


def test_the_load_balance_of_experts(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, router_aux_loss_coef=0.01)  # TRL recomputes by default
    assert config.objective.router_aux_loss_coef == 0.01
    assert not config.train.gradient_checkpointing
    assert "the routers of a recomputed layer pass no gradient on" in imported.text
    _, imported = convert(tmp_path, router_aux_loss_coef=None)
    assert (
        "router_aux_loss_coef: 0.0  # TRL's default of router_aux_loss_coef; of a mixture of "
        "experts TRL takes the one in its config.json: put that here" in imported.text
    )


def test_adafactor_where_train_refuses_it(tmp_path: Path) -> None:
    _, imported = convert(tmp_path, optim="adafactor")
    assert imported.differs == [
        "optim: adafactor; train refuses it with train.deepspeed zero3 and model.dtype bfloat16: "
        "set zero0 and float32, or train.optimizer adamw_8bit to save memory"
    ]
    plain = {"deepspeed": {"zero_optimization": {"stage": 0}}, "bf16": False}
    assert convert(tmp_path, optim="adafactor", **plain)[1].differs == []


def test_what_is_not_taken_says_what_to_do(tmp_path: Path) -> None:
    _, imported = convert(tmp_path, **dict.fromkeys(keys.DIFFERS, "another"))
    expected = [f"{key}: another; {remedy}" for key, (_, remedy) in sorted(keys.DIFFERS.items())]
    assert imported.differs == expected
    assert all(f"\n#   {note}\n" in imported.text for note in expected)
    defaults = {key: default for key, (default, _) in keys.DIFFERS.items() if default is not None}
    assert convert(tmp_path, **defaults)[1].differs == []


def test_what_is_not_needed_is_listed(tmp_path: Path) -> None:
    notes = keys.NOT_NEEDED | keys.FORMER
    text = convert(tmp_path, **dict.fromkeys(notes, "x"))[1].text
    assert [key for key in notes if f"\n#   {key}: " not in text] == []


def test_an_adapters_keys_without_use_peft_are_listed(tmp_path: Path) -> None:
    config, imported = convert(tmp_path, lora_r=8)
    assert config.adapter is None
    assert "#   lora_r: without effect beside the other keys" in imported.text


@pytest.mark.parametrize(("values", "said"), [
    ({"learnin_rate": 1, "zzz": 2}, "has 2 unknown keys:\n  learnin_rate: unknown key; did you "
     "mean learning_rate?\n  zzz: unknown key; nothing of that name is near\nexpected keys of "),
    ({"model_name_or_path": None}, "model_name_or_path is missing; expected the model that TRL"),
    ({"dataset_name": None}, "neither dataset_name nor datasets is there; expected the preference"),
    ({"learning_rate": "fast"}, "learning_rate: 'fast'; expected a number. Correct the YAML."),
    ({"use_peft": "maybe"}, "use_peft: 'maybe'; expected true or false. Correct the YAML."),
    ({"datasets": ["a"]}, "datasets: ['a']; expected a list of mappings of path, name, "),
    ({"loss_type": "dpoo"}, "what became of "),
])  # fmt: skip
def test_errors(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(tmp_path, **values)
    assert said in str(error.value)


def test_the_number_of_processes_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        convert(tmp_path, processes=None)
    assert str(error.value) == (
        f"{tmp_path}/trl.yaml: the number of processes is not in TRL's YAML; expected it, because "
        "per_device_train_batch_size x gradient_accumulation_steps x num_processes = "
        "train.global_batch_size. Add --num-processes N, the GPUs of the TRL run, or "
        "--accelerate-config FILE."
    )


def test_files_that_are_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="nowhere.yaml: No such file or directory; expected a trainer's YAML"
    ):
        import_config(tmp_path / "nowhere.yaml", (), 1, None, "TRL")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list; expected a trainer's YAML, a map"):
        import_config(path, (), 1, None, "TRL")
    with pytest.raises(ConfigError, match="'beta'; expected KEY=VALUE with a key of the file"):
        import_config(write(tmp_path, NEEDED), ["beta"], 1, None, "TRL")


def test_the_command(tmp_path: Path) -> None:
    path, out = write(tmp_path, NEEDED | {"sync_ref_model": True}), tmp_path / "run.yaml"
    command = ("import-trl", path, "beta=0.3", "--num-processes", "2")
    printed = succeed(*command)
    assert succeed(*command, "--out", out).stdout == "" and out.read_text() == printed.stdout
    assert load_config(out).objective.beta == 0.3
    assert printed.stderr.splitlines() == [
        "per_device_train_batch_size 8 x gradient_accumulation_steps 1 x num_processes 2 = "
        "train.global_batch_size 16",
        "not taken: sync_ref_model: True; the reference is scored once and stays as it is",
    ]
    again = dpo_dist(*command, "--out", out)
    assert again.returncode == 2
    assert (
        again.stderr == f"error: {out} exists; expected a new file. Name another, or remove it.\n"
    )


def test_neither_trl_nor_torch_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path, NEEDED)
    program = (
        "import sys; sys.modules |= dict.fromkeys(('trl', 'torch', 'transformers', 'peft'))\n"
        "from dpo_dist.cli.app import app\n"
        f"app(['import-trl', {str(path)!r}, '--num-processes', '1'])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)
