"""QLoRA: a base in NF4 trains, resumes, exports and is counted as the docs say."""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import succeed
from support.ranks import run_ranks
from support.tiny_engine import checkpoints_of
from support.tiny_models import tiny_model
from support.tiny_run import make_run, metrics_of

from dpo_dist.config.run_config import load_config, parse_config
from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints import checkpoint, saving
from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.engine.model import quantized
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.load import load_model, num_parameters
from dpo_dist.engine.model.model_choice import choose_model, digest_of_chosen, load_chosen
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.engine.model.policy import PolicyParts, build_policy, settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.errors import ConfigError
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.planning.memory_resident import parameter_sizes
from dpo_dist.planning.setup import Setup, sharding_of
from dpo_dist.planning.sizes import total
from dpo_dist.reference.contract import complete_store, scoring_contract
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import from_environment

pytestmark = pytest.mark.timeout(900)
CPU = torch.device("cpu")
# (ZeRO stage, dtype, gradient checkpointing)
CASES = [(0, "float32", False), (2, "float32", True), (3, "float32", True), (3, "bfloat16", False)]
GLOBAL_BATCH = 4


def section(path: str | Path, **settings: Any) -> ModelSection:
    return ModelSection.model_validate(
        {"path": str(path), "dtype": "float32", "quantization": "nf4"} | settings
    )


def name_of(case: tuple[int, str, bool]) -> str:
    return f"zero{case[0]}-{case[1]}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


def start(model_dir: str, case: tuple[int, str, bool], universal: bool = False) -> Any:
    stage, dtype, recomputes = case
    topology, model = from_environment(), section(model_dir, dtype=dtype)
    train = TrainSection.model_validate(
        {"learning_rate": 1e-3, "warmup_ratio": 0, "deepspeed": f"zero{stage}"}
        | {"gradient_checkpointing": recomputes}
    )
    sharding = ds_config.training_config(train, dtype, topology.world_size, universal=universal)
    if stage == 3:  # else a tiny model's parameters stay whole
        sharding["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    parts = PolicyParts(Path(model_dir), model, AdapterSection())  # pyright: ignore[reportCallIssue]
    engine, scorer = build_policy(parts, train, sharding, num_steps=10, device=CPU, seed=3)
    assert settle_layout(engine, scorer, model, CPU) == "packed"
    return engine


def train_step(engine: Any, step: int) -> float:
    """One step on this rank's share; the loss over all pairs."""
    chance, topology = random.Random(step), from_environment()
    pairs = [
        tuple([chance.randrange(3, 128) for _ in range(length)] for length in (9, 7, 8))
        for _ in range(GLOBAL_BATCH)
    ]
    own = pack_pairs(pairs[topology.rank :: topology.world_size], CPU)  # pyright: ignore
    scores = score_pairs(engine, own)
    margins = 0.3 * (scores[:, 0] - scores[:, 1])
    loss = -torch.nn.functional.logsigmoid(margins).sum() / GLOBAL_BATCH
    zero.backward(engine, loss, last=True, world_size=topology.world_size)
    zero.update(engine)
    return float(collectives.sum_over_ranks(loss.detach().double()))


def packed_share(engine: Any) -> float:
    """How much of its quantized weights this rank holds."""
    packed = [p for p in engine.module.parameters() if hasattr(p, "quant_state")]
    held = sum(getattr(p, "ds_tensor", p).nbytes for p in packed)
    return held / sum(quantized.true_numel(p) / 2 for p in packed)


def trained(folder: str, model_dir: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with collectives.process_group(from_environment()):
        ranks = from_environment().world_size
        for case in CASES if ranks > 1 else CASES[::2]:
            engine = start(model_dir, case)
            share = packed_share(engine)
            losses = [train_step(engine, step) for step in (1, 2)]
            run = checkpoints_of(folder, f"{name_of(case)}-{ranks}")
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            state = TrainState(2, 8, 0.5, {}, ranks, case[0])
            path = saving.save(engine, run, state, *probe, keep=2)
            losses += [train_step(engine, step) for step in (3, 4)]
            zero.take_down(engine)
            engine = start(model_dir, case)
            checkpoint.load(engine, path, {})
            resumed = [train_step(engine, step) for step in (3, 4)]
            zero.take_down(engine)
            found[name_of(case)] = {"losses": losses, "resumed": resumed, "share": share}
    return found


def converted(folder: str, model_dir: str) -> list[float]:
    """What follows on this number of ranks after two ranks saved under ZeRO-3."""
    case = CASES[2]
    path = checkpoints_of(folder, f"{name_of(case)}-2") / "step-000002"
    with collectives.process_group(from_environment()):
        assert checkpoint.needs_resharding(path, from_environment().world_size)
        engine = start(model_dir, case, universal=True)
        checkpoint.load(engine, path, {})
        return [train_step(engine, step) for step in (3, 4)]


@pytest.fixture(scope="module")
def found(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("qlora")
    arguments = (str(folder), str(model_dir))
    return folder, {n: run_ranks(n, trained, *arguments, timeout_s=280)[0] for n in (1, 2)}


def test_ranks_and_stages_agree(found: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    plain = found[1][1]["zero0-float32"]["losses"]
    assert len(set(plain)) == 4
    for results in found[1].values():
        for name, one in results.items():
            tolerance = 1e-5 if name.endswith("float32") else 0.1  # by the CPU's bfloat16
            assert one["losses"] == pytest.approx(plain, abs=tolerance), name


def test_a_resume_is_exact(found: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    for results in found[1].values():
        for name, one in results.items():
            assert one["resumed"] == one["losses"][2:], name


def test_zero3_shards_what_is_packed(found: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    assert {name: one["share"] for name, one in found[1][2].items()} == {
        name_of(case): 0.5 if case[0] == 3 else 1.0 for case in CASES
    }


def test_checkpoints_hold_the_adapter_alone(
    found: tuple[Path, dict[int, dict[str, Any]]],
) -> None:
    for case in CASES:
        step_dir = checkpoints_of(found[0], f"{name_of(case)}-2") / "step-000002"
        with open_checkpoint(step_dir) as shards:
            assert len(shards.names_and_shapes) == 28  # A and B of 7 layers in 2 blocks
            assert all(".lora_" in name for name in shards.names_and_shapes)


def test_another_number_of_ranks_continues(
    found: tuple[Path, dict[int, dict[str, Any]]], model_dir: Path
) -> None:
    (losses,) = run_ranks(1, converted, str(found[0]), str(model_dir), timeout_s=280)
    assert losses == pytest.approx(found[1][2]["zero3-float32"]["losses"][2:], rel=1e-5)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
def test_it_computes_with_the_weights_it_unpacks(family: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    tiny_model(family).save_pretrained(tmp_path)
    packed: Any = load_model(tmp_path, section(tmp_path), device=CPU)
    plain: Any = load_model(tmp_path, section(tmp_path, quantization=None), device=CPU)
    whole, changed = dict(plain.named_parameters()), 0
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if hasattr(parameter, "quant_state"):
                unpacked = dequantize_4bit(parameter.data, parameter.quant_state)
                weight = whole[name]
                weight.copy_(unpacked if family != "gpt2" else unpacked.T)
                changed += weight.numel()
        pairs = pack_pairs([([5, 6, 7], [8, 9], [10, 11, 12])], CPU)
        ours, theirs = PairScorer(packed)(pairs), PairScorer(plain)(pairs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    shape = count_model(tmp_path, None, quantized=True)
    assert shape.num_quantized == changed > 0
    assert num_parameters(packed)[1] == num_parameters(plain)[1] == shape.num_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planner_counts_its_bytes(dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, section(tmp_path, dtype=dtype), device=CPU)
    held = 0
    for parameter in model.parameters():
        held += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    setup = Setup(
        shape=count_model(tmp_path, None, quantized=True),
        sharding=sharding_of(ds_config.read_sharding("zero0")),
        world_size=1, dtype_bytes=2 if dtype == "bfloat16" else 4, micro_batch_tokens=1,
        scoring_tokens=0, logits_per_chunk=1, checkpointing=True,
    )  # fmt: skip
    sizes = {size.name: size for size in parameter_sizes(setup)}
    assert total(sizes.values()) == pytest.approx(held, rel=1e-4)
    packed = setup.shape.num_quantized
    assert sizes["nf4_parameters"].num_bytes + sizes["nf4_scales"].num_bytes == pytest.approx(
        0.516 * packed, rel=1e-3
    )
    assert sizes["nf4_scales"].arithmetic == (
        "(1/64 + 4/16384) bytes x 1.31 M quantized parameters, on every rank"
    )


def test_base_and_export_are_quantized_alike(model_dir: Path, tmp_path: Path) -> None:
    """The merged model is compared with the full-precision base, the adapter with the NF4 one."""
    paths = RunDir(tmp_path)

    def packed(which: str) -> tuple[bool, str]:
        choice = choose_model(which, paths, model_dir)
        model = load_chosen(choice, model_dir, section(model_dir), CPU)
        digest = digest_of_chosen(choice, model_dir, section(model_dir))
        return any(hasattr(p, "quant_state") for p in model.parameters()), digest

    base = load_model(model_dir, section(model_dir, quantization=None), device=CPU)
    add_adapter(base, AdapterSection(rank=4), str(model_dir)).save_pretrained(  # pyright: ignore
        paths.adapter_dir
    )
    assert packed("base")[0] and packed("export")[0]
    quantized = packed("base")[1]
    shutil.copytree(model_dir, paths.model_dir(True))
    assert not packed("base")[0] and not packed("export")[0] and packed("adapter")[0]
    assert packed("base")[1] == packed("export")[1] != quantized


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        load_model(model_dir, section(model_dir), device=CPU)
    assert str(caught.value) == (
        "model.quantization: nf4, and bitsandbytes is not installed; expected bitsandbytes. "
        "Install it with `pip install 'dpo-dist[qlora]'`, or choose another value."
    )


def test_packed_weights_are_not_trained(model_dir: Path) -> None:
    from dpo_dist.engine.model.adapters import add_adapter

    for name, trains in (("lm_head", True), ("o_proj", False)):
        adapter = AdapterSection.model_validate(
            {"target_modules": ["q_proj"], "modules_to_save": [name]}
        )
        model = load_model(model_dir, section(model_dir), device=CPU)
        policy = add_adapter(model, adapter, "m")
        if trains:
            quantized.refuse_trained_quantized(policy)
            continue
        with pytest.raises(ConfigError) as caught:
            quantized.refuse_trained_quantized(policy)
        assert str(caught.value).startswith("adapter.modules_to_save trains ")
        assert str(caught.value).endswith(
            "o_proj.modules_to_save.default.weight, which model.quantization has packed; expected "
            "modules that stay unquantized: embeddings, norms, the output head. Leave it out, or "
            "name it in adapter.target_modules."
        )


def test_what_it_does_not_go_with() -> None:
    raw = {"run": {"dir": "x"}, "data": {"train": [{"path": "a"}]}}
    model = {"path": "m", "quantization": "nf4"}
    with pytest.raises(ConfigError, match="nf4 without an adapter section; expected one, because"):
        parse_config(raw | {"model": model})
    with pytest.raises(
        ConfigError, match="adapter.use_dora: true with model.quantization; expected"
    ):
        parse_config(raw | {"model": model, "adapter": {"use_dora": True}})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run(tmp_path: Path) -> None:
    """The reference is the quantized policy; ranks and stages agree; verify says what it cost."""
    run = make_run(tmp_path)
    settings = ["model.quantization=nf4", "adapter.rank=4", "train.max_steps=4"]
    settings += ["checkpoint.every_steps=2", "eval.every_steps=2", "reference.sharding=zero3"]
    succeed("run", run, *settings)
    out = tmp_path / "out"
    first = next(line for line in metrics_of(out) if line.get("step") == 1)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)

    nf4, plain = load_config(run, settings), load_config(run)
    contracts = [scoring_contract(RunModels(config), "packed") for config in (nf4, plain)]
    assert contracts[0].digest() != contracts[1].digest()
    keys = open_pairs(out / "pairs", "train").keys
    assert complete_store(RunModels(nf4), keys) and complete_store(RunModels(plain), keys) is None

    checks = {c["name"]: c for c in json.loads((out / "verify.json").read_text())["checks"]}
    for kind in ("adapter", "merged"):
        assert checks[f"{kind}: probe, packed forward"]["max_difference"] < 5e-5
    reported = checks["merged: against quantized training"]
    assert 0.01 < reported["max_difference"] < reported["tolerance"]
    assert "nats on average" in reported["detail"]

    succeed("evaluate", run, *settings)
    after = json.loads((out / "evaluate.json").read_text())["after"]
    last = next(m for m in reversed(metrics_of(out)) if "eval_rewards/margins" in m)
    for name in ("rewards/margins", "rewards/accuracies"):
        assert after[name] == pytest.approx(last[f"eval_{name}"], abs=1e-4)

    other = tmp_path / "one-rank"
    shutil.copytree(out / "pairs", other / "pairs")
    one = [*settings, f"run.dir={other}", "local.workers=1", "reference.sharding=whole"]
    for stage in ("reference", "train"):
        succeed(stage, run, *one, "train.deepspeed=zero2")
    losses = [[m["loss"] for m in metrics_of(d) if "loss" in m] for d in (out, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
