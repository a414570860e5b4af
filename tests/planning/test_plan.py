"""The planner as its users see it: counts without weights, text, JSON, dry run, errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.commands import dpo_dist, succeed
from support.tiny_models import FAMILIES, tiny_model
from support.tiny_run import NUM_EVAL, NUM_TRAIN, make_run
from transformers import LlamaConfig

from dpo_dist.commands.plan import make_plan
from dpo_dist.config.run_config import RunConfig, load_config, parse_config
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.errors import ConfigError, DataError, ModelFilesError
from dpo_dist.inputs.setup import count_shape
from dpo_dist.planning.run_plan import as_dict, as_text


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine with GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run.yaml of a tiny run whose pairs are prepared."""
    path = make_run(tmp_path_factory.mktemp("run"))
    succeed("prepare", path)
    return path


def write_7b(folder: Path) -> Path:
    """A model folder that holds config.json alone: a 6.7 B llama."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def config_of(tmp_path: Path, base: str, **sections: Any) -> RunConfig:
    raw = {
        "run": {"dir": str(tmp_path / "out")},
        "model": {"path": base},
        "data": {"train": [{"path": "train.jsonl"}]},
    }
    return parse_config(raw | sections)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_weights(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    shape = count_model(tmp_path, None)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_trained == shape.num_parameters and shape.head_trained


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 4, "use_dora": True},
        {"rank": 4, "modules_to_save": ["lm_head"]},
        {"rank": 4, "rank_pattern": {"q_proj": 9}, "exclude_modules": ["up_proj"]},
        {"rank": 4, "target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    ],
)
def test_adapter_parameters_are_counted(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = AdapterSection.model_validate(settings)
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    real = add_adapter(model, adapter, "base")
    shape = count_model(tmp_path, adapter)
    assert shape.num_trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert shape.num_parameters == sum(p.numel() for p in real.parameters())
    assert shape.head_trained == ("modules_to_save" in settings)


def test_a_continued_adapter_is_counted_as_it_is(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = tiny_model("llama")
    model.save_pretrained(base)
    section = AdapterSection(rank=3, rank_pattern={"q_proj": 9}, modules_to_save=["lm_head"])
    policy: Any = add_adapter(model, section, str(base))
    policy.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    path = tmp_path / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    config = config_of(tmp_path, str(base), adapter={"path": str(tmp_path / "sft")})
    shape = count_shape(config, config.adapter)
    assert shape.num_trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    text = as_text(make_plan(config, world_size=1, gpu_memory_gib=80))
    assert f"the adapter {tmp_path / 'sft'}" in text


def test_added_tokens_are_counted(tmp_path: Path) -> None:
    """Of a model whose tokenizer is not here every added token counts as a new one."""
    base = write_7b(tmp_path / "base")
    config = config_of(tmp_path, str(base))
    tokens = {"path": str(base), "add_tokens": ["<a>"], "pad_vocab_to_multiple": 64}
    longer = config_of(tmp_path, str(base), model=tokens)
    before, after = (count_shape(c, None) for c in (config, longer))
    assert (before.vocab_size, after.vocab_size) == (32000, 32064)
    assert after.num_parameters - before.num_parameters == 2 * 64 * 4096


def test_experts_of_other_tokens_are_not_active(tmp_path: Path) -> None:
    model = tiny_model("mixtral")  # two experts of four
    model.config.save_pretrained(tmp_path)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    embedding = model.get_input_embeddings().weight.numel()
    assert count_model(tmp_path, None).num_active == matrices - embedding - experts // 2
    plan = as_dict(make_plan(config_of(tmp_path, str(tmp_path)), 8, 80))
    total = plan["run"]["num_parameters"]
    assert plan["run"]["num_active_parameters"] == matrices - embedding - experts // 2
    assert plan["arithmetic"]["run.num_active_parameters"] == (
        f"= {total:,} - {experts // 2:,} in the 2 of 4 experts that a token passes by - "
        f"{total - matrices + embedding:,} of embedding and vectors"
    )
    flops = 2 * plan["run"]["num_active_parameters"]
    assert plan["work"]["forward_gflop_per_token"] == flops / 1e9


def test_json_has_every_number_with_its_unit_and_arithmetic(tmp_path: Path) -> None:
    config = config_of(tmp_path, str(write_7b(tmp_path / "model")))
    plan = as_dict(make_plan(config, world_size=8, gpu_memory_gib=80))
    memory = plan["memory_per_gpu"]
    assert plan["fits"] is True and plan["remedies"] == []
    assert plan["run"]["num_parameters"] == 6_738_415_616
    assert memory["optimizer_gib"] == pytest.approx(12 * 6_738_415_616 / 8 / 2**30)
    assert plan["arithmetic"]["memory_per_gpu.optimizer_gib"] == (
        "= 12 bytes x 6.74 B trained parameters / 8 ranks"
    )
    assert plan["work"]["num_steps"] is None and plan["disk"]["pairs_gib"] is None
    assert json.loads(json.dumps(plan)) == plan
    assert not (tmp_path / "out").exists()


def test_the_best_checkpoint_is_one_more_on_the_disk(tmp_path: Path) -> None:
    model = str(write_7b(tmp_path / "m"))
    for sections, number in (({}, 3), ({"checkpoint": {"best_by": "eval_loss"}}, 4)):
        plan = make_plan(config_of(tmp_path, model, **sections), 8, None)
        assert f"{number} x 12 bytes x" in as_text(plan), as_text(plan)


def test_without_a_gpu_memory_nobody_knows_whether_it_fits(tmp_path: Path) -> None:
    config = config_of(tmp_path, str(write_7b(tmp_path / "model")))
    plan = make_plan(config, world_size=8, gpu_memory_gib=None)
    assert plan.fits is None
    assert "fits                       unknown  without --gpu-memory-gib" in as_text(plan)


def test_a_misfit_has_remedies(tmp_path: Path) -> None:
    config = config_of(tmp_path, str(write_7b(tmp_path / "model")))
    plan = make_plan(config, world_size=1, gpu_memory_gib=24)
    assert plan.fits is False
    fitting = [remedy.change for remedy in plan.remedies if remedy.fits]
    assert "adapter.rank=16 (LoRA)" in fitting
    assert "what would help, each on its own" in as_text(plan)
    config = config_of(tmp_path, config.model.path, adapter={"rank": 16})
    changes = {r.change: r for r in make_plan(config, 1, 8).remedies}
    packed = changes["model.quantization=nf4 (QLoRA)"]
    assert packed.peak_bytes == min(change.peak_bytes for change in changes.values())


def test_a_plan_of_long_pairs_says_how_long_and_what_would_help(tmp_path: Path) -> None:
    model = str(write_7b(tmp_path / "model"))
    long = {"micro_batch_tokens": 131_072, "deepspeed": "zero2"}
    plan = make_plan(config_of(tmp_path, model, adapter={}, train=long), 1, 80)
    assert plan.fits is False
    both = "train.tiled_mlp=8192 train.offload_activations=true"
    assert plan.remedies[0].change == both and plan.remedies[0].fits
    keys = {"tiled_mlp": 8192, "offload_activations": True}
    helped = make_plan(config_of(tmp_path, model, adapter={}, train=long | keys), 1, 80)
    found, entries = as_dict(helped), as_text(helped)
    assert found["fits"] is True
    assert found["memory_per_gpu"]["peak_gib"] == plan.remedies[0].peak_bytes / 2**30
    assert found["memory_per_host"]["layer_inputs_gib"] == 32
    assert found["memory_per_gpu"]["longest_pair_that_fits"] > 131_072
    assert re.search(
        r"longest pair that fits +[\d,]+  tokens = \(80.0 GiB - 2.0 GiB reserve - "
        r"[\d.]+ GiB resident - [\d.]+ [GM]iB of a micro-batch of any length\) / [\d,]+ bytes",
        entries,
    )
    assert "of MLPs recomputed in tiles" in entries


def test_offload_moves_the_optimizer_to_the_host(tmp_path: Path) -> None:
    model = str(write_7b(tmp_path / "model"))
    config = config_of(tmp_path, model, train={"deepspeed": "zero3_offload"})
    plan = as_dict(make_plan(config, world_size=16, gpu_memory_gib=None))
    assert "optimizer_gib" not in plan["memory_per_gpu"]
    # 8 of the 16 ranks are on one host: float32 copy, two moments, gradient, its sum
    assert plan["memory_per_host"]["optimizer_gib"] == pytest.approx(
        8 * 20 * 6_738_415_616 / 16 / 2**30
    )


def test_steps_and_batches_come_from_the_prepared_pairs(prepared: Path) -> None:
    plan = as_dict(make_plan(load_config(prepared), world_size=2, gpu_memory_gib=None))
    assert plan["work"]["num_pairs"] == NUM_TRAIN
    assert plan["work"]["num_steps"] == 2 * NUM_TRAIN // 8
    assert plan["batches"]["pairs_per_rank"] == 4
    assert plan["batches"]["micro_batches_per_step"] >= 1
    assert plan["disk"]["reference_store_gib"] == 24 * (NUM_TRAIN + NUM_EVAL) / 2**30
    assert plan["disk"]["pairs_gib"] > 0
    capped = load_config(prepared, ["train.max_steps=3"])
    assert as_dict(make_plan(capped, 2, None))["work"]["num_steps"] == 3


def test_ranks_that_share_rows_are_planned_as_one(prepared: Path) -> None:
    config = load_config(prepared, ["train.sequence_parallel=2"])
    plan, alone = (
        as_dict(make_plan(each, world_size=4, gpu_memory_gib=1.0))
        for each in (config, load_config(prepared))
    )
    assert plan["run"]["ranks_per_row"] == 2 and plan["batches"]["pairs_per_rank"] == 4
    assert plan["batches"]["micro_batches_per_step"] >= alone["batches"]["micro_batches_per_step"]
    assert plan["arithmetic"]["batches.pairs_per_rank"] == "= 8 pairs / 2 teams of 2 ranks"
    assert plan["batches"]["all_to_all_gib"] > 0 and "all_to_all_gib" not in alone["batches"]
    assert plan["arithmetic"]["batches.all_to_all_gib"].startswith("sent in a step = ")
    longest = "longest_pair_that_fits"
    assert plan["memory_per_gpu"][longest] == pytest.approx(
        2 * alone["memory_per_gpu"][longest], rel=0.01
    )
    with pytest.raises(ConfigError, match="train.sequence_parallel: 2 on 3 ranks; expected a num"):
        make_plan(config, 3, None)


def test_a_pair_longer_than_a_micro_batch_is_found_now(prepared: Path) -> None:
    config = load_config(prepared, ["train.micro_batch_tokens=8"])
    with pytest.raises(DataError, match="expected at most micro_batch_tokens = 8. Set train"):
        make_plan(config, 2, None)


def test_fewer_pairs_than_a_global_batch_are_found_now(prepared: Path) -> None:
    config = load_config(prepared, ["train.global_batch_size=64"])
    with pytest.raises(DataError, match="40 pairs; expected at least one global batch of 64 pairs"):
        make_plan(config, 2, None)


@pytest.mark.slow  # tries the hub again and again
def test_a_model_that_no_hub_answers_for(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="expected a model folder or a reachable hub id"):
        make_plan(config_of(tmp_path, "nobody/no-such-model"), 1, None)


def test_bad_models_and_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(ModelFilesError) as caught:
        make_plan(config_of(tmp_path, str(tmp_path)), 1, None)
    assert "is of no model that transformers can build" in str(caught.value)
    assert str(caught.value).endswith(
        "expected a causal language model. Check model.path, or upgrade transformers."
    )
    with pytest.raises(ConfigError) as wrong:
        make_plan(config_of(tmp_path, str(tmp_path)), 0, None)
    assert str(wrong.value) == "--world-size 0; expected 1 or more ranks. Correct it."


def test_an_adapter_that_matches_nothing_is_found_now(tmp_path: Path) -> None:
    model = str(write_7b(tmp_path / "model"))
    config = config_of(tmp_path, model, adapter={"target_modules": ["nothing"]})
    with pytest.raises(ConfigError, match="the model has no module nothing"):
        make_plan(config, 1, None)


def test_a_dry_run_prints_config_plan_and_commands_and_writes_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    printed = succeed("run", "--dry-run", path, "train.global_batch_size=4").stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert "global_batch_size: 4" in printed
    assert "global batch pairs" in printed and "what is known" in printed
    for stage in ("prepare", "reference", "train", "export", "verify"):
        assert f"-m dpo_dist {stage} {path} train.global_batch_size=4" in printed
    variables = "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1"
    assert f"{variables} MASTER_PORT=PORT " in printed


@pytest.mark.fault(28, "HF_TOKEN and a dry run", becomes="not shown")
def test_a_token_in_the_environment_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    done = dpo_dist("run", "--dry-run", make_run(tmp_path))
    assert done.returncode == 0
    assert "hf_very_secret" not in done.stdout + done.stderr


def test_a_forward_ahead_and_no_reference_are_planned(prepared: Path) -> None:
    def group(name: str, *overrides: str) -> dict[str, Any]:
        plan = make_plan(load_config(prepared, overrides), 2, None)
        return {entry.key: entry for entry in plan.groups[name]}

    plain, coupled = group("work"), group("work", "objective.loss=aot")
    key = "training_gflop_per_token"
    forward = plain["forward_gflop_per_token"].value
    assert coupled[key].value == pytest.approx(plain[key].value + forward)
    assert coupled[key].why.endswith(
        f"; + {forward:.3g} of a forward ahead of them, since aot sorts the pairs of a step"
    )
    assert group("work", "objective.loss=simpo")["reference_pflop"].value == 0
    free = group("reference_pass", "objective.loss=simpo")
    assert free["needed"].why == "objective.loss simpo has no reference"
    assert "reference_store_gib" not in group("disk", "objective.loss=simpo")


def test_truth_13_evaluate_and_verify_are_counted_as_the_reference_is(prepared: Path) -> None:
    def passes(*overrides: str) -> dict[str, Any]:
        plan = make_plan(load_config(prepared, overrides), 2, 80.0)
        return {entry.key: entry.value for entry in plan.groups["evaluate_and_verify"]}

    both = passes()
    assert set(both) == {"whole_gib", "zero3_gib", "fits"} and both["fits"] is True
    assert set(passes("reference.sharding=zero3")) == {"zero3_gib", "fits"}
    assert passes("objective.loss=simpo") == both  # no reference pass, and yet an export
    small = make_plan(load_config(prepared, ["reference.sharding=whole"]), 2, 2.0)
    assert small.groups["evaluate_and_verify"][-1].value is False and small.fits is False
