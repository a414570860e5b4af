"""What the last stages refuse is refused in front, by the same words: a case for every refusal."""

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import dpo_dist
from support.tiny_export import trained_run
from support.tiny_run import make_run
from support.weights.start_adapters import edited, save_adapter
from transformers import AutoTokenizer, Blip2Config

from dpo_dist.commands import plan
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import DPODistError
from dpo_dist.stages import export, prepare, verify

Change = Callable[[Path], object]


def config_json(folder: Path, **changes: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    torch.save({}, folder / "model" / "pytorch_model.bin")


def stored_elsewise(folder: Path) -> None:
    """One tensor of another shape than the model's."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, path)


def start_adapter(folder: Path, **changes: Any) -> None:
    save_adapter(folder / "start", folder / "model", "llama", target_modules=["q_proj"])
    edited(folder / "start", **changes)


def sharding(folder: Path, **settings: Any) -> None:
    (folder / "sharding.json").write_text(json.dumps(settings))


def blip(folder: Path) -> None:
    Blip2Config().save_pretrained(folder / "model")


def versioned_tokenizer(folder: Path) -> None:
    """A file under a name that transformers takes and no export copies."""
    model = folder / "model"
    (model / "tokenizer.json").rename(model / "tokenizer.4.0.0.json")
    path = model / "tokenizer_config.json"
    named = {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))


@dataclass(frozen=True)
class Case:
    """A run that cannot end well: which function says so, and what it says."""

    says: str
    overrides: Sequence[str] = ()
    change: Change = lambda folder: None
    family: str = "llama"


LORA = "adapter.rank=2"
CASES = {
    "engine/weights/base_weights.py:refuse_quantized": Case(
        "holds quantized weights (gptq); expected weights in float32, bfloat16 or float16. Set "
        "model.path to the original of the model; model.quantization=nf4 packs it while it is "
        "loaded.",
        change=lambda folder: config_json(folder, quantization_config={"quant_method": "gptq"}),
    ),
    "engine/weights/base_weights.py:open_base": Case(
        "has pickled weights only (pytorch_model.bin); expected safetensors, whose headers tell",
        ["model.allow_pickle_weights=true", LORA],
        pickled,
    ),
    "engine/weights/base_weights.py:build_skeleton": Case(
        "config.json is of no model that transformers can build (", change=blip
    ),
    "engine/weights/base_weights.py:_settle": Case(
        "model.norm.weight (3,) would load as ", change=stored_elsewise
    ),
    "model_files/files.py:weight_files": Case("has pickled weights only", change=pickled),
    "engine/weights/safetensors_reader.py:_read_header": Case(
        "model.safetensors",
        change=lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"{" * 40),
    ),
    "engine/model/adapters.py:_refuse_unknown": Case(
        "adapter.target_modules: the model has no module query_proj",
        ["adapter.target_modules=[query_proj]"],
    ),
    "engine/model/adapters.py:_check_names": Case(
        "the regular expression .*query_proj fits no module's whole name",
        ["adapter.target_modules=.*query_proj"],
    ),
    "engine/model/adapters.py:add_adapter": Case(
        "peft cannot adapt this model", ["adapter.target_modules=[input_layernorm]"]
    ),
    "engine/model/adapters.py:_check_patterns": Case(
        "adapter.rank_pattern: nothing fits no adapted module",
        ["adapter.rank_pattern={nothing: 4}"],
    ),
    "engine/model/adapters.py:refuse_partitions_beside_adapted": Case(
        "in the partitions of ZeRO-3; expected whole weights there",
        ["adapter.target_parameters=[mlp.experts.gate_up_proj]", "train.deepspeed=zero3"],
        family="gpt_oss",
    ),
    "engine/export/weight_changes.py:_adapted": Case(
        "conv is of kind Conv1d; expected adapters on linear layers, embeddings and stacked",
        ["adapter.target_modules=[conv.conv]", "adapter.rank=32"],
        family="lfm2",
    ),
    "engine/forward/model_parts.py:output_module": Case(
        "the adapter targets the output head (", ["adapter.target_modules=[q_proj, lm_head]"]
    ),
    "engine/forward/model_parts.py:num_experts": Case(
        "objective.router_aux_loss_coef is set and LlamaForCausalLM gives no router logits",
        ["objective.router_aux_loss_coef=0.01"],
    ),
    "inputs/work.py:check_heads": Case(
        "train.sequence_parallel: 3, and {folder}/model has 4 attention heads; expected a number "
        "of ranks that share them evenly: 1, 2, 4. Set train.sequence_parallel to one of them; or",
        ["train.sequence_parallel=3"],
    ),
    "engine/model/quantized.py:refuse_trained_in": Case(
        "o_proj.modules_to_save.default.weight, which model.quantization has packed",
        ["model.quantization=nf4", "adapter.modules_to_save=[o_proj]"],
    ),
    "engine/sharding/ds_config.py:read_sharding": Case(
        "has no zero_optimization.stage", ["train.deepspeed={folder}/sharding.json"], sharding
    ),
    "engine/sharding/ds_config.py:check_optimizer": Case(
        "train.optimizer: adafactor with train.deepspeed zero2",
        ["train.optimizer=adafactor", "train.deepspeed=zero2"],
    ),
    "engine/weights/adapter_file.py:read_start": Case(
        "has bias=all (adapter_config.json)",
        ["adapter.path={folder}/start"],
        lambda folder: start_adapter(folder, bias="all"),
    ),
    "engine/weights/adapter_file.py:check_fit": Case(
        "does not fit the model: ",
        ["adapter.path={folder}/start"],
        lambda folder: start_adapter(folder, r=5),
    ),
    "model_files/files.py:check_named_base": Case(
        "was trained on owner/another, and model.path is ",
        ["adapter.path={folder}/start"],
        lambda folder: start_adapter(folder, base_model_name_or_path="owner/another"),
    ),
    "engine/export/own_base.py:check_new_tokens_train": Case(
        "model.add_tokens: the adapter leaves ",
        ["model.add_tokens=[<new>]", "adapter.modules_to_save=[input_layernorm]"],
    ),
    "exporting/preflight.py:_try_tokenizer": Case(
        "an export's copy of the tokenizer in {folder}/model ",
        change=versioned_tokenizer,
    ),
    "inputs/work.py:_check_held_out": Case(
        "eval.samples_every_steps is 5, and there are no held-out pairs",
        ["data.eval=[]", "eval.samples_every_steps=5"],
    ),
    "model_files/hub.py:require_token": Case(
        "no token to push to owner/name with; expected a token that may write there",
        ["export.push_to_hub=owner/name"],
    ),
}


def refused(run: Callable[[RunConfig], object], config: RunConfig) -> tuple[str, str]:
    """(message, file:function that raised it)."""
    with pytest.raises(DPODistError) as caught:
        run(config)
    last = traceback.extract_tb(caught.value.__traceback__)
    package = str(Path(prepare.__file__).parents[1]) + "/"
    own = [frame for frame in last if frame.filename.startswith(package)]
    frame = next(f for f in reversed(own) if f.name != "__exit__")
    return str(caught.value), f"{frame.filename.removeprefix(package)}:{frame.name}"


@pytest.mark.parametrize("raised_by", CASES)
def test_prepare_dry_run_and_doctor_refuse(
    raised_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[raised_by]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path = make_run(tmp_path, case.family)
    case.change(tmp_path)
    overrides = [text.replace("{folder}", str(tmp_path)) for text in case.overrides]
    config = load_config(path, overrides)
    message, where = refused(prepare.run, config)
    assert case.says.replace("{folder}", str(tmp_path)) in message and where == raised_by
    assert refused(lambda c: plan.print_dry_run(c, path, overrides), config)[0] == message
    assert not (tmp_path / "out" / "pairs").exists()


@pytest.mark.slow
def test_the_commands_exit_with_2_and_write_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    lora = ["adapter.target_modules=[query_proj]", "local.workers=1"]
    for command in (["prepare"], ["run", "--dry-run"], ["doctor"]):
        done = dpo_dist(*command, path, *lora)
        assert done.returncode == 2, done.stderr
        assert "error: adapter.target_modules: the model has no module query_proj" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "pairs").exists()


def test_an_adapter_alone_exports_from_pickled_weights(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    pickled(tmp_path)
    merged = ["model.allow_pickle_weights=true", LORA]
    prepare.run(load_config(path, [*merged, "export.merge=false"]))
    with pytest.raises(DPODistError, match=r"an adapter exports without this under export.merge"):
        prepare.run(load_config(path, merged))


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_tokenizer_with_files_of_its_own_is_exported_whole(
    tmp_path: Path, template: str | None
) -> None:
    """Named templates, a processor's settings, and no tokenizer_config.json under chatml."""
    path = make_run(tmp_path)
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (model / "preprocessor_config.json").write_text("{}")
    config = load_config(path, [f"data.chat_template={template}"] if template else [])
    run = trained_run(config)
    export.run(config)
    folder = run.paths.model_dir(merged=False)
    assert (folder / "preprocessor_config.json").is_file()
    found = AutoTokenizer.from_pretrained(folder).chat_template
    assert isinstance(found, str) if template else set(found) == {"default", "rag"}
    verify.run(config)


def test_the_words_of_a_push_of_an_adapter_on_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    path = make_run(tmp_path)
    pushed = [LORA, "export.push_to_hub=me/mine", "export.hub_folder=adapter"]
    message, where = refused(prepare.run, load_config(path, pushed))
    assert where == "exporting/preflight.py:_try_push"
    assert message == (
        "export.push_to_hub: me/mine with an adapter that names its base model by a folder of this "
        f"machine ({tmp_path / 'model'}); expected its hub id, with which others can load the "
        "adapter. Set export.base_model=owner/name."
    )
    prepare.run(load_config(path, [*pushed, "export.base_model=owner/base"]))
