"""The optimizers of `train.optimizer` under real ZeRO: ranks, resumes, memory, refusals."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.tiny_engine import checkpoints_of, start_engine, train_step
from support.tiny_models import tiny_model

from dpo_dist.config.run_config import parse_config
from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.checkpoints import checkpoint, saving
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.model.model_shape import shape_of
from dpo_dist.engine.sharding import ds_config, optimizers
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.planning.memory_resident import OPTIMIZER_BYTES, resident_sizes
from dpo_dist.planning.setup import Setup, sharding_of
from dpo_dist.run.run_dir import TRAIN_STATE_NAME
from dpo_dist.run.topology import from_environment

pytestmark = pytest.mark.timeout(900)
WIDTH, DEPTH = 96, 2  # the 8-bit optimizers leave vectors below 4096 elements as they are
# (optimizer, ZeRO stage, dtype)
CASES = [
    ("adamw_8bit", 0, "float32"),
    ("adamw_8bit", 2, "float32"),
    ("adamw_8bit", 3, "float32"),
    ("adamw_8bit", 3, "bfloat16"),
    ("muon", 0, "float32"),
    ("muon", 2, "float32"),
    ("muon", 3, "float32"),
    ("muon", 3, "bfloat16"),
    ("adafactor", 0, "float32"),
]


def name_of(case: tuple[str, int, str]) -> str:
    return "-".join(map(str, case))


def state_bytes(engine: Any) -> int:
    """Of the tensors in the optimizer's state; maps of code to value are shared by all."""
    return sum(
        tensor.nbytes
        for state in engine.basic_optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and "qmap" not in key and tensor.numel() > 1
    )


def trained(folder: str) -> dict[str, Any]:
    """Every optimizer: losses of four steps, those after a resume at the second, its memory."""
    found: dict[str, Any] = {}
    with collectives.process_group(from_environment()):
        ranks = torch.distributed.get_world_size()
        for case in CASES:
            name, stage, dtype = case
            model: dict[str, Any] = {"adapter": False, "width": WIDTH, "depth": DEPTH}
            engine = start_engine(stage, dtype=dtype, optimizer=name, **model)
            losses = [train_step(engine, step) for step in (1, 2)]
            state = TrainState(2, 12, 0.5, {"train.optimizer": name}, ranks, stage)
            run = checkpoints_of(folder, f"{name_of(case)}-{ranks}")
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            path = saving.save(engine, run, state, *probe, keep=2)
            losses += [train_step(engine, step) for step in (3, 4)]
            held = state_bytes(engine)
            engine.destroy()
            engine = start_engine(stage, dtype=dtype, optimizer=name, **model)
            checkpoint.load(engine, path, {"train.optimizer": name})
            resumed = [train_step(engine, step) for step in (3, 4)]
            engine.destroy()
            found[name_of(case)] = {"losses": losses, "resumed": resumed, "bytes": held}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("optimizers"))
    return {ranks: run_ranks(ranks, trained, folder, timeout_s=280)[0] for ranks in (1, 2)}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_resume_is_exact(case: Any, found: dict[int, dict[str, Any]]) -> None:
    for results in found.values():
        one = results[name_of(case)]
        assert one["resumed"] == one["losses"][2:]
        assert len(set(one["losses"])) == 4


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_and_stages_do_not_change_the_losses(
    case: Any, found: dict[int, dict[str, Any]]
) -> None:
    name, stage, dtype = case
    one, two = (found[ranks][name_of(case)]["losses"] for ranks in (1, 2))
    # A block of 256 values that share a scale lies in a rank's own vector.
    loose = name == "adamw_8bit" and stage > 0
    assert two == pytest.approx(one, rel=2e-3 if loose or dtype == "bfloat16" else 1e-6)
    if name == "muon" and dtype == "float32":
        assert two == pytest.approx(found[1][name_of((name, 0, dtype))]["losses"], rel=1e-6)


def test_the_states_take_what_the_planner_says(found: dict[int, dict[str, Any]]) -> None:
    square, table = DEPTH * WIDTH * WIDTH, 13 * WIDTH
    vectors = DEPTH * WIDTH + WIDTH
    # one vector of all; in ZeRO-3 the tiny sub-groups of this engine stay in float32
    held = found[1]["adamw_8bit-2-float32"]["bytes"]
    assert held == OPTIMIZER_BYTES["adamw_8bit"] * (square + table + vectors)
    assert found[2]["adamw_8bit-2-float32"]["bytes"] == held / 2
    held = found[1]["muon-3-float32"]["bytes"]
    assert held == OPTIMIZER_BYTES["muon"] * square + 8 * (table + vectors)
    held = found[1]["adafactor-0-float32"]["bytes"]
    assert held == 4 * (DEPTH * 2 * WIDTH + 13 + WIDTH + vectors)


def test_matrices_go_to_muon_and_tables_to_adamw() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3))
    train = TrainSection.model_validate({"optimizer": "muon", "max_grad_norm": 0})
    config = ds_config.training_config(train, "float32", 1)
    assert config["zero_optimization"]["reduce_scatter"] is False
    groups = optimizers.make_optimizer(module, config, train).param_groups
    shapes = {group["use_muon"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert shapes == {True: [(3, 4)], False: [(5, 4), (3,)]}


def test_another_number_of_ranks_needs_adamw(tmp_path: Path) -> None:
    step_dir = tmp_path / "step-000002"
    step_dir.mkdir()
    for optimizer, stage in (("muon", 3), ("adamw_8bit", 0), ("adamw", 3)):
        state = TrainState(2, 12, 0.5, {"train.optimizer": optimizer}, 2, stage)
        (step_dir / TRAIN_STATE_NAME).write_text(state.to_json())
        assert checkpoint.needs_resharding(step_dir, 2) is False
        if optimizer != "muon":
            assert checkpoint.needs_resharding(step_dir, 3) == (optimizer == "adamw")
            continue
        with pytest.raises(CheckpointError) as caught:
            checkpoint.needs_resharding(step_dir, 3)
        assert str(caught.value) == (
            f"{step_dir} holds the state of muon on 2 ranks, and only that of adamw can be cut for "
            "another number; expected 2 ranks, not 3. Continue on 2 ranks."
        )


@pytest.mark.parametrize(
    ("settings", "dtype", "said"),
    [
        (
            {"optimizer": "adafactor", "deepspeed": "zero3"}, "float32",
            "train.optimizer: adafactor with train.deepspeed zero3 and model.dtype float32, where "
            "DeepSpeed hands it vectors, not matrices; expected zero0 and float32, because on a "
            "vector it has no rows and columns to factor: it would save little and step "
            "differently on another number of ranks. Choose train.optimizer=adamw_8bit to save "
            "memory under ZeRO.",
        ),
        (
            {"optimizer": "adafactor", "deepspeed": "zero0"}, "bfloat16",
            "train.optimizer: adafactor with train.deepspeed zero0 and model.dtype bfloat16",
        ),
        (
            {"optimizer": "muon", "deepspeed": "zero3_offload"}, "bfloat16",
            "train.optimizer: muon with train.deepspeed zero3_offload, which keeps the optimizer "
            "in host memory; expected adamw, the only optimizer that DeepSpeed updates "
            "there. Choose "
            "train.optimizer=adamw, or a train.deepspeed without offload.",
        ),
    ],
)  # fmt: skip
def test_where_an_optimizer_is_not_right(settings: Any, dtype: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ds_config.training_config(TrainSection.model_validate(settings), dtype, 2)
    assert str(caught.value).startswith(said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can page")
def test_paging_needs_a_gpu() -> None:
    train = TrainSection.model_validate({"optimizer": "paged_adamw_8bit"})
    config = ds_config.training_config(train, "float32", 1)
    with pytest.raises(ConfigError) as caught:
        optimizers.make_optimizer(torch.nn.Linear(2, 2), config, train)
    assert str(caught.value) == (
        "train.optimizer: paged_adamw_8bit on a machine without a GPU; expected a CUDA GPU, whose "
        "unified memory does the paging. Choose adamw_8bit here."
    )


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    train = TrainSection.model_validate({"optimizer": "adamw_8bit"})
    config = ds_config.training_config(train, "float32", 1)
    with pytest.raises(ConfigError) as caught:
        optimizers.make_optimizer(torch.nn.Linear(2, 2), config, train)
    assert str(caught.value) == (
        "train.optimizer: adamw_8bit, and bitsandbytes is not installed; expected bitsandbytes. "
        "Install it with `pip install 'dpo-dist[qlora]'`, or choose another value."
    )


def test_truth_09_bitsandbytes_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports all the same, and complains at the first call."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def without_library(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nCUDA SETUP ERROR: Missing dependency: libcudart.so.13\n\nTo fix ...")

    monkeypatch.setattr(functional, "quantize_blockwise", without_library)
    train = TrainSection.model_validate({"optimizer": "adamw_8bit"})
    config = ds_config.training_config(train, "float32", 1)
    with pytest.raises(ConfigError) as caught:
        optimizers.make_optimizer(torch.nn.Linear(2, 2), config, train)
    assert str(caught.value) == (
        "train.optimizer: adamw_8bit, and bitsandbytes does not run on cpu: CUDA SETUP ERROR: "
        "Missing dependency: libcudart.so.13 To fix ...; expected bitsandbytes with a library for "
        "this machine. See `python -m bitsandbytes`, or choose another value."
    )


def test_muon_is_not_clipped() -> None:
    raw = {"run": {"dir": "x"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    parse_config(raw | {"train": {"optimizer": "muon", "max_grad_norm": 0}})
    with pytest.raises(
        ConfigError, match="1.0 with train.optimizer muon; expected 0, because ZeRO would"
    ):
        parse_config(raw | {"train": {"optimizer": "muon"}})


def test_the_planner_tells_muon_and_adafactor_apart() -> None:
    shape = shape_of(tiny_model("llama"))  # 2 layers: 4 matrices of attention, 3 of the MLP
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    tables = 2 * 128 * 32
    assert shape.num_without_muon == tables + 5 * 32
    assert shape.num_factors == 2 * (64 + 64 + 48 + 48 + 3 * 80) + 2 * 160 + 5 * 32
    common: dict[str, Any] = {
        "shape": shape, "world_size": 2, "dtype_bytes": 4, "micro_batch_tokens": 1,
        "scoring_tokens": 0, "logits_per_chunk": 1, "checkpointing": True,
    }  # fmt: skip
    zero3, zero0 = (sharding_of(ds_config.read_sharding(name)) for name in ("zero3", "zero0"))
    held = {
        name: sum(
            size.num_bytes
            for size in resident_sizes(Setup(**common, sharding=sharding, optimizer=name))
            if size.name in ("optimizer", "second_moment")
        )
        for name, sharding in (("muon", zero3), ("adamw", zero3), ("adafactor", zero0))
    }
    trained = layers + tables + 5 * 32
    assert held["adamw"] == 12 * trained // 2
    assert held["muon"] == (8 * layers + 12 * (tables + 5 * 32)) // 2
    assert held["adafactor"] == 4 * shape.num_factors
