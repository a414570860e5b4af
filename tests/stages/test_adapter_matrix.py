"""Adapters of every kind through a whole run: trained on two ranks under ZeRO-3, continued on one
rank from the same checkpoint, exported, merged by streaming, verified.

The limits of ZeRO-3 are set to 0, so that every weight is in partitions whenever it is not in use:
with its own, tiny models are never partitioned at all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.tiny_run import fail_on, make_run, metrics_of
from support.weights.start_adapters import edited
from support.weights.trained_weights import adapted

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import complete_store
from dpo_dist.run.run_dir import RunDir
from dpo_dist.stages import export, generate, prepare, reference, train, verify

pytestmark = pytest.mark.timeout(900)
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
NUM_STEPS = 4
COMMON = [
    f"train.max_steps={NUM_STEPS}", "checkpoint.every_steps=2", "data.eval.0.limit=4",
    "eval.every_steps=100", "generate.num_prompts=1", "generate.max_new_tokens=4",
]  # fmt: skip
BOTH_SAVED = "adapter.modules_to_save=[embed_tokens,lm_head]"
TOKENS = ['model.add_tokens=["<|a|>","<|b|>"]', "model.pad_vocab_to_multiple=64"]
SFT_PLAIN: dict[str, Any] = {"rank": 3, "alpha": 4.0}

# name -> (family, settings of the adapter it starts from or None, overrides)
CASES: dict[str, tuple[str, dict[str, Any] | None, list[str]]] = {
    "merged, fresh dora, added tokens, tied": (
        "llama_tied",
        SFT_PLAIN,
        ["adapter.start=merge", BOTH_SAVED, "adapter.use_dora=true", *TOKENS],
    ),
    "continued, rslora, patterns, head saved": (
        "llama",
        SFT_PLAIN
        | {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "modules_to_save": ["lm_head"]},
        [],
    ),
    "all-linear": ("llama", None, []),
    "experts, one parameter": (
        "mixtral",
        None,
        ["adapter.target_modules=[q_proj]", "adapter.target_parameters=[experts.down_proj]",
         "adapter.use_rslora=true"],
    ),
    "dora, patterns": (
        "llama",
        None,
        ["adapter.use_dora=true", "adapter.rank_pattern={q_proj: 5}",
         "adapter.alpha_pattern={down_proj: 9}", "adapter.exclude_modules=[k_proj]"],
    ),
    "rslora": ("qwen2", None, ["adapter.use_rslora=true"]),
    "all-linear on experts": ("mixtral", None, []),
    "all-linear on other experts": ("qwen3_moe", None, []),
    "experts, both parameters": (
        "mixtral",
        None,
        ["adapter.target_parameters=[experts.gate_up_proj,experts.down_proj]",
         "adapter.target_modules=[q_proj]"],
    ),
    "transposed experts": (
        "gpt_oss",
        None,
        ["adapter.target_modules=[q_proj,o_proj]",
         "adapter.target_parameters=[experts.gate_up_proj,experts.down_proj]",
         "train.deepspeed=zero2"],
    ),
    "conv1d": ("gpt2", None, ["adapter.use_dora=true"]),
    "embeddings and head saved": ("llama", None, [BOTH_SAVED]),
    "embeddings and head saved, tied": ("llama_tied", None, [BOTH_SAVED]),
    "head saved, tied": ("llama_tied", None, ["adapter.modules_to_save=[lm_head]"]),
    "embeddings saved, tied": ("llama_tied", None, ["adapter.modules_to_save=[embed_tokens]"]),
    "embeddings adapted": ("llama", None, ["adapter.target_modules=[embed_tokens,q_proj]"]),
    "added tokens, all parameters": ("llama_tied", None, ["adapter=null", *TOKENS]),
    "added tokens, lora": ("qwen2", None, [BOTH_SAVED, *TOKENS]),
    "continued dora": ("llama", SFT_PLAIN | {"use_dora": True}, []),
    "continued, patterns": ("qwen2", SFT_PLAIN | {"rank_pattern": {"q_proj": 5}}, []),
    "continued, embeddings and head saved, tied": (
        "llama_tied", SFT_PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]}, []
    ),
    "continued experts": ("mixtral", SFT_PLAIN, []),
    "continued, one parameter of the experts": (
        "mixtral",
        SFT_PLAIN | {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        [],
    ),
    "merged, fresh": ("llama", SFT_PLAIN | {"use_dora": True}, ["adapter.start=merge"]),
    "merged experts, fresh": ("mixtral", SFT_PLAIN, ["adapter.start=merge"]),
    "continued, reference in partitions": (
        "llama", SFT_PLAIN | {"use_dora": True}, ["reference.sharding=zero3"]
    ),
}  # fmt: skip


def config_of(folder: Path, name: str) -> RunConfig:
    family, sft, overrides = CASES[name]
    adapter = [] if "adapter=null" in overrides else ["adapter.rank=3", "adapter.alpha=6"]
    if sft is not None:
        adapter = [f"adapter.path={folder / 'sft'}"]
        if "adapter.start=merge" in overrides:
            adapter += ["adapter.rank=2"]
    return load_config(
        folder / "run.yaml",
        [f"train.deepspeed={folder / 'zero3.json'}", *COMMON, *adapter, *overrides],
    )


def make_case(folder: Path, name: str) -> RunConfig:
    """A prepared run, with a trained adapter to start from where the case has one."""
    family, sft, _ = CASES[name]
    make_run(folder, family)
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO3}))
    if sft is not None:
        policy = started(load_model_of(folder), sft, folder)
        policy.save_pretrained(folder / "sft", save_embedding_layers=False)
        edited(folder / "sft", base_model_name_or_path=str(folder / "model"))
    config = config_of(folder, name)
    prepare.run(config)
    return config


def load_model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def started(model: Any, sft: dict[str, Any], folder: Path) -> Any:
    from dpo_dist.config.training_section import AdapterSection

    return adapted(model, AdapterSection.model_validate(sft), folder / "model")[0]


def work(folder: str, name: str, stage: str) -> None:
    """Runs a stage on this rank."""
    stages = {"reference": reference.run, "train": train.run, "generate": generate.run}
    stages[stage](config_of(Path(folder), name))


@torch.no_grad()
def scores_of_the_start(config: RunConfig, folder: Path, name: str) -> np.ndarray[Any, Any]:
    """(N, 2) log-probs of the training pairs by the base model with peft's own adapter on it."""
    import peft

    path = RunDir(config.run.dir).base_dir
    model: Any = load_model_of(folder)
    if RunModels(config).start_adapter is not None:
        model = peft.PeftModel.from_pretrained(model, folder / "sft")
    elif path.is_dir():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    scorer = PairScorer(model).eval()
    settle_layout(scorer, scorer, config.model, torch.device("cpu"))
    pairs = open_pairs(RunDir(config.run.dir).pairs_dir, "train")
    rows = [scorer(pack_pairs([pairs.token_ids(i)])).numpy() for i in range(len(pairs))]
    return np.concatenate(rows)


def check(name: str, folder: Path, two_ranks: list[dict[str, Any]]) -> None:
    """The reference is the start; one rank continues as two did; the export is what was trained."""
    config = config_of(folder, name)
    paths = RunDir(config.run.dir)
    pairs = open_pairs(paths.pairs_dir, "train")
    held = complete_store(RunModels(config), pairs.keys)
    assert held is not None
    stored = held[1].lookup(pairs.keys)
    assert np.abs(stored - scores_of_the_start(config, folder, name)).max() < 2e-4
    steps = [
        [line for line in lines if "loss" in line] for lines in (two_ranks, metrics_of(paths.root))
    ]
    assert [line["step"] for line in steps[1]] == list(range(1, NUM_STEPS + 1))
    for left, right in zip(*steps, strict=True):
        assert left["rewards/margins"] == pytest.approx(right["rewards/margins"], abs=2e-5)
        assert left["logps/chosen"] == pytest.approx(right["logps/chosen"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert steps[1][0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(steps[1][-1]["rewards/margins"]) > 1e-4
    export.run(config)
    verify.run(config)
    assert json.loads(paths.verify_path.read_text())["passed"] is True
    if RunModels(config).start_adapter is not None:  # answers before are those of base and adapter
        run_ranks(1, work, str(folder), name, "generate")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_trained_continued_on_one_rank_exported_and_verified(name: str, tmp_path: Path) -> None:
    config = make_case(tmp_path, name)
    paths = RunDir(config.run.dir)
    in_partitions = config.reference.sharding == "zero3"
    run_ranks(1 + in_partitions, work, str(tmp_path), name, "reference", timeout_s=400)
    run_ranks(2, work, str(tmp_path), name, "train", timeout_s=400)
    two_ranks = metrics_of(paths.root)
    shutil.rmtree(paths.checkpoint_dir(NUM_STEPS))
    run_ranks(1, work, str(tmp_path), name, "train", timeout_s=400)
    check(name, tmp_path, two_ranks)


def test_partitions_beside_adapted_experts_are_refused(tmp_path: Path) -> None:
    name = "transposed experts"
    make_case(tmp_path, name)
    overrides = [f"train.deepspeed={tmp_path / 'zero3.json'}", *COMMON, *CASES[name][2][:-1]]
    message = fail_on(1, "train", tmp_path / "run.yaml", "adapter.rank=3", *overrides)
    assert (
        "the adapter takes down_proj, gate_up_proj of experts that have gate_up_proj_bias, "
        "down_proj_bias beside, in the partitions of ZeRO-3; expected whole weights there: "
        "DeepSpeed "
        "loses track of what is beside an adapted parameter. Set train.deepspeed=zero2 and "
        "reference.sharding=whole, or name the layers without the experts in "
        "adapter.target_modules."
    ) in message
