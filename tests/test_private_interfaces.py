"""The register of other libraries' private interfaces that the code leans on: a row, a test.

A row names what its library does not promise: names with an underscore, modules that its
documentation leaves out, names that are patched or read from another program's output. `gone` says
what happens once it is no longer there. The test below a row meets the real library, so that an
upgrade fails here, by name, and not in somebody's run. The last tests compare the rows with the
code: a use without a row fails, and so does a row without a use.
"""

import ast
import dataclasses
import fnmatch
import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ranks import ROOT, free_port, run_ranks

FORWARD, MODEL = "dpo_dist/engine/forward/", "dpo_dist/engine/model/"
CHECKPOINTS = "dpo_dist/engine/checkpoints/"


@dataclasses.dataclass(frozen=True)
class Row:
    """One interface: `names` as the code spells them, `files` that use it (patterns of fnmatch)."""

    library: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    why: str
    gone: str
    shown_by: str  # the test

    def covers(self, file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in self.files)


ROWS: list[Row] = []
Test = Callable[..., None]


def row(library: str, *names: str, files: str, why: str, gone: str) -> Callable[[Test], Test]:
    """Enters an interface into the register; the test below it shows what is relied on."""

    def enter(test: Test) -> Test:
        ROWS.append(Row(library, names, tuple(files.split()), why, gone, test.__name__))
        return test

    return enter


# torch


@row(
    "torch", "torch._subclasses.fake_tensor", "_checkpoint_offset",
    files=f"{CHECKPOINTS}shard_reader.py",
    why="where in a shard a tensor's data lies, without reading the shard",
    gone="export fails with an import error or 'torch did not tell where'; no way around is built",
)  # fmt: skip
def test_fake_tensors_tell_where_a_file_has_their_data(tmp_path: Path) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = {"a": torch.arange(3), "b": torch.arange(9.0)[4:]}
    torch.save(tensors, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    with FakeTensorMode():
        loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, tensor in tensors.items():
        first = loaded[name].untyped_storage()._checkpoint_offset
        first += loaded[name].storage_offset() * tensor.element_size()
        assert content[first : first + tensor.nbytes] == tensor.numpy().tobytes()


@row(
    "torch", "get_default_build_root", "TORCH_EXTENSIONS_DIR", "*/lock", "*/*/lock",
    files="dpo_dist/engine/distributed/collectives.py",
    why="a killed build leaves its lock, and every later rank waits for it without an end",
    gone="stale locks stay: a job hangs at its start until the folder is deleted by hand",
)  # fmt: skip
def test_a_build_locks_its_folder_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    taken: list[Path] = []

    def lock_of(place: str | None) -> Path:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if place is not None:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", place)
        with pytest.raises(StopIteration):
            cpp_extension.load("ours", [str(tmp_path / "x.cpp")])
        return taken[-1]

    class Baton(cpp_extension.FileBaton):
        def __init__(self, path: str, *_: Any, **__: Any) -> None:
            taken.append(Path(path))
            raise StopIteration

    (tmp_path / "x.cpp").write_text("")
    (tmp_path / "held").touch()
    assert not cpp_extension.FileBaton(str(tmp_path / "held")).try_acquire()
    monkeypatch.setattr(cpp_extension, "FileBaton", Baton)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path / "root"))
    assert lock_of(str(tmp_path / "own")).match(f"{tmp_path}/own/*/lock")
    assert lock_of(None).match(f"{tmp_path}/root/*/*/lock")


@row(
    "torch", "memory._record_memory_history", "memory._dump_snapshot",
    files="dpo_dist/training/profiling.py",
    why="what held a GPU's memory, for pytorch.org/memory_viz; torch documents only this way",
    gone="train.profile_steps fails on GPUs at its first step",
)  # fmt: skip
def test_memory_histories_take_these_arguments() -> None:
    import torch

    inspect.signature(torch.cuda.memory._record_memory_history).bind(max_entries=10)
    inspect.signature(torch.cuda.memory._record_memory_history).bind(enabled=None)
    inspect.signature(torch.cuda.memory._dump_snapshot).bind("a path")


@row(
    "torch", "torch.cuda.nccl", files="dpo_dist/stages/doctor.py",
    why="nodes whose NCCL differs do not understand each other",
    gone="the doctor fails at import",
)  # fmt: skip
def test_nccl_has_a_version() -> None:
    import torch
    import torch.cuda.nccl as nccl

    assert callable(nccl.version)
    assert not torch.cuda.is_available() or nccl.version() > (2,)


@row(
    "torch", "torch.distributed.rendezvous", files="dpo_dist/engine/distributed/devices.py",
    why="ranks agree on their devices in the store by which their group meets afterwards",
    gone="no distributed stage starts: an import error, or the port is in use",
)  # fmt: skip
def test_a_port_is_met_at_twice_by_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.rendezvous import rendezvous

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    first, second = (next(iter(rendezvous("env://", 0, 1)))[0] for _ in range(2))
    first.set("claim", "mine")
    assert second.get("claim") == b"mine"


@row(
    "torch", "torch.utils._python_dispatch", "torch.utils._pytree",
    files="benchmarks/live_bytes.py",
    why="counts the bytes that operations make, on a CPU too",
    gone="memory cannot be measured in benchmarks and in the tests that use them",
)  # fmt: skip
def test_a_dispatch_mode_sees_every_operation() -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert [name.split(".")[1] for name in seen] == ["ones", "add"]
    assert tree_leaves(({"a": 1}, [2, (3,)])) == [1, 2, 3]


@row(
    "torch", "_setup_privateuseone_for_python_backend", "torch._subclasses.fake_tensor",
    "torch.utils.backend_registration", "torch.utils._python_dispatch", "avoid_device_init",
    "_get_privateuse1_backend_name", "_local_scalar_dense", "_to_copy", "_parameters", "_buffers",
    "is_fake_tensor",
    files="tests/support/devices/second_device.py",
    why="a second device on machines without a GPU, which tells what crosses to it and back",
    gone="tests on the second device fail; nothing of the package does",
)  # fmt: skip
def test_a_second_device_tells_what_crosses_and_raises_on_a_mix() -> None:
    (seen,) = run_ranks(1, on_second_device)
    here = "test_private_interfaces.py:on_second_device"
    in_backward = "test_private_interfaces.py:backward"
    assert seen == {
        "mixed": "FakeTensorDeviceMismatchError",
        "unknown shape": "DynamicOutputShapeException",
        "gradient": "gpu",
        "uploads": 3,
        "blocking": [here, here],
        "waits": [here, here, here, in_backward],
    }


def on_second_device() -> dict[str, Any]:
    import torch
    from support.devices.second_device import Traffic, second_device

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * grad.max().item()

    seen: dict[str, Any] = {}
    with second_device() as device, Traffic() as traffic:
        here = torch.ones(3)
        there = here.to(device).requires_grad_()
        for name, call in {"mixed": lambda: here + there, "unknown shape": there.nonzero}.items():
            try:
                call()
            except RuntimeError as error:
                seen[name] = type(error).__name__
        here.to(device, non_blocking=True)
        torch.tensor([1.0], device=device)
        bool((there > 0).all()), there.sum().tolist(), there.cpu()
        Reads.apply(there).sum().backward()  # pyright: ignore
        seen["gradient"] = there.grad.device.type if there.grad is not None else None
    return seen | {
        "uploads": traffic.uploads,
        "blocking": traffic.blocking,
        "waits": traffic.waits,
    }


@row(
    "torch", "torch.distributed.checkpoint._state_dict_stager",
    files=f"{CHECKPOINTS}host_copies.py",
    why="shards are copied into host memory that is kept, so that a checkpoint is written behind",
    gone="training fails at import; checkpoint.mode=blocking would need none of it",
)  # fmt: skip
def test_a_stager_copies_what_changes_and_keeps_its_memory() -> None:
    import torch
    from torch.distributed.checkpoint._state_dict_stager import StateDictStager

    stager, flat = StateDictStager(), torch.zeros(6)
    state = {"a": [flat[:2], flat[2:]], "b": SimpleNamespace(scale=flat), "step": 3}
    first = stager.stage(state)
    flat += 1
    assert first["a"][1].tolist() == [0, 0, 0, 0] and first["b"].scale.tolist() == [0] * 6
    place = first["a"][0].untyped_storage().data_ptr()
    assert place == first["a"][1].untyped_storage().data_ptr()
    second = stager.stage(state)
    assert second["b"].scale.tolist() == [1] * 6
    assert second["a"][0].untyped_storage().data_ptr() == place


# transformers


@functools.cache
def tiny(family: str) -> Any:
    from support.tiny_models import tiny_model

    return tiny_model(family)


@row(
    "transformers", "_attn_implementation", "_can_set_attn_implementation",
    "get_correct_attn_implementation", files=f"{FORWARD}pair_scorer.py",
    why="the packed attention is put in for scoring, and the model's own back for generation",
    gone="scoring fails at the first forward",
)  # fmt: skip
def test_attentions_are_exchanged_by_name() -> None:
    model = tiny("llama")
    assert model.get_correct_attn_implementation(None) == "sdpa"
    assert model._can_set_attn_implementation() is True
    assert tiny("bloom")._can_set_attn_implementation() is False
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@row(
    "transformers", "_gradient_checkpointing_func", files=f"{MODEL}recompute.py",
    why="the function by which a layer is recomputed: around it, its inputs go to host memory",
    gone="train.offload_activations is refused: the model recomputes in a way of its own",
)  # fmt: skip
def test_every_layer_has_the_function_by_which_it_is_recomputed() -> None:
    import torch

    model, calls = tiny("llama"), []
    model.activation_checkpointing_enable({"use_reentrant": True})
    for layer in model.model.layers:
        own = vars(layer)["_gradient_checkpointing_func"]

        def counted(function: Any, *inputs: Any, own: Any = own) -> Any:
            calls.append([type(each).__name__ for each in inputs])
            return own(function, *inputs)

        layer._gradient_checkpointing_func = counted
    model.train()(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
    model.eval()
    model.activation_checkpointing_disable()
    assert calls == [["Tensor"]] * len(model.model.layers)  # the hidden states and nothing else


@row(
    "transformers", "local_size", "use_vmap", "s_aux", "position_bias",
    files=f"{FORWARD}attention.py",
    why="which keywords models hand to a registered attention and mask: window, sinks, soft cap",
    gone="a window or a sink is not seen; the trial at load then falls back to padded sequences",
)  # fmt: skip
def test_models_hand_windows_sinks_and_our_own_keywords_on() -> None:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    calls: dict[str, dict[str, Any]] = {}
    masks: dict[str, dict[str, Any]] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        calls[module.config.model_type] = given | {"mask": mask}
        return query.transpose(1, 2), None

    def mask_of(**given: Any) -> Any:
        masks[given["config"].model_type] = given
        window = given.get("local_size")
        return None if window is None else torch.tensor(window)

    AttentionInterface.register("recording", attend)
    AttentionMaskInterface.register("recording", mask_of)
    for family in ("mistral", "gemma2", "gpt_oss"):
        tiny(family).set_attn_implementation("recording")
        tiny(family)(input_ids=torch.arange(9)[None], use_cache=False, packed_row="ours")
    assert [call["packed_row"] for call in calls.values()] == ["ours"] * 3
    assert int(calls["mistral"]["mask"]) == calls["mistral"]["sliding_window"] == 7
    assert calls["gemma2"]["softcap"] == 0.5
    assert calls["gpt_oss"]["s_aux"].shape == (4,)
    assert [mask["use_vmap"] for mask in masks.values()] == [False] * 3


@row(
    "transformers", "transformers.quantizers.base", "transformers.quantizers.quantizers_utils",
    "transformers.pytorch_utils", "_keep_in_fp32_modules", files=f"{MODEL}quantized.py",
    why="counts what loading in NF4 would pack, without loading",
    gone="`plan` fails for runs with model.quantization",
)  # fmt: skip
def test_what_quantization_leaves_out_can_be_asked() -> None:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert get_keys_to_not_convert(tiny("llama")) == ["lm_head"]
    assert should_convert_module("model.layers.0.self_attn.q_proj", ["lm_head"])
    assert not should_convert_module("lm_head", ["lm_head"])
    assert not tiny("llama")._keep_in_fp32_modules
    assert tuple(Conv1D(3, 5).weight.shape) == (5, 3)


@row(
    "transformers", "transformers.conversion_mapping", "transformers.core_model_loading",
    "_weight_conversions", files="dpo_dist/engine/weights/base_weights.py",
    why="exports have the names of the base folder, which loading renames and fuses",
    gone="export fails at import; adapters still export with export.merge=false",
)  # fmt: skip
def test_weights_are_renamed_and_fused_there_and_back() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )

    model, fused = tiny("mixtral"), "model.layers.0.mlp.experts.gate_up_proj"
    stored = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    name, pattern = rename_source_key(
        stored.format(0), renamings, converters, model.base_model_prefix, model.state_dict()
    )
    assert name == fused and pattern in converters[0].source_patterns
    model._weight_conversions = [t for t in transforms if t.was_used()]
    back = revert_weight_conversion(model, {fused: model.get_parameter(fused).detach()})
    assert {stored.format(expert) for expert in range(4)} < back.keys()
    names = [stored.format(number) for number in (10, 2)]
    assert sorted(names, key=dot_natural_key) == names[::-1]


@row(
    "transformers", "unset_hf_deepspeed_config", files=f"{MODEL}load.py",
    why="loading and peft take partitions for granted while, and only while, the marker lives",
    gone="ZeRO-3 loads fail at import",
)  # fmt: skip
def test_the_mark_of_zero3_lives_as_long_as_its_object() -> None:
    from transformers.integrations import deepspeed

    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    marker = deepspeed.HfDeepSpeedConfig(settings)
    assert deepspeed.is_deepspeed_zero3_enabled()
    deepspeed.unset_hf_deepspeed_config()
    assert not deepspeed.is_deepspeed_zero3_enabled()
    marker = deepspeed.HfDeepSpeedConfig(settings)
    assert deepspeed.is_deepspeed_zero3_enabled()
    del marker
    assert not deepspeed.is_deepspeed_zero3_enabled()


@row(
    "transformers", "_name_or_path", "_model_name_or_path",
    files="dpo_dist/model_files/files.py examples/quickstart/fetch_model.py",
    why="a path of this machine, or a GGUF's title, that must not go out with a config.json",
    gone="nothing: there is no such key to leave out",
)  # fmt: skip
def test_a_config_writes_every_key_that_it_was_given(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", _model_name_or_path="a title")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_model_name_or_path"] == "a title"
    assert AutoConfig.from_pretrained(tmp_path)._name_or_path == str(tmp_path)


# DeepSpeed: two ranks, asked once for everything


def in_engines(folder: str) -> dict[str, Any]:
    """What engines of three stages do, say and write on this rank."""
    from deepspeed.accelerator import get_accelerator

    from dpo_dist.engine.distributed import collectives
    from dpo_dist.run.topology import from_environment

    unlink, buffers = collectives._unlink_shared_memory, list[str]()

    def look(topology: Any) -> None:
        buffers.extend(path.name for path in Path("/dev/shm").glob("deepspeed_*"))
        unlink(topology)

    collectives._unlink_shared_memory = look
    topology = from_environment()
    with collectives.process_group(topology):
        place = f"127.0.0.1_{topology.master_port}_{topology.rank}"
        return {
            "buffer": f"deepspeed_allreduce_buffer_{os.getuid()}_{place}" in buffers,
            "accelerator": [get_accelerator()._name, get_accelerator().device_count()],
            **{f"stage{stage}": in_engine(stage, Path(folder)) for stage in (0, 2, 3)},
        }


def loads_of(optimizer: Any, stage: int) -> list[Any]:
    """How ZeRO's optimizer asks for a parameter of a checkpoint of other ranks."""
    if stage == 3:
        return [*inspect.signature(optimizer.load_hp_checkpoint_state).parameters]
    mapped = [p for p in optimizer.bit16_groups[0] if p._hp_mapping is not None]
    names = [optimizer.param_names[p] for p in optimizer.bit16_groups[0]]
    return [
        [*inspect.signature(mapped[0].load_hp_checkpoint_state).parameters],
        dir(mapped[0]._hp_mapping), names,
    ]  # fmt: skip


def in_engine(stage: int, folder: Path) -> dict[str, Any]:
    import torch
    from support.tiny_engine import start_engine, train_step

    calls: list[str] = []
    scripts: list[Any] = []

    class Saving:
        """A checkpoint engine that notes what is asked of it."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *_, **__: calls.append(name)

        def save(self, state_dict: Any, path: str) -> None:
            calls.append("save")
            torch.save(state_dict, path)

    engine = start_engine(stage, adapter=False)
    gradients = []
    for last in (False, True):
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(torch.tensor([[1, 2]])) * 2, scale_wrt_gas=False)
        parameter = engine.module.policy.scale
        gradients.append(None if stage else float(parameter.grad.norm()))
    engine.step()
    norm = engine.get_global_grad_norm()
    train_step(engine, 1)
    engine.checkpoint_engine, own = Saving(), engine.checkpoint_engine
    engine._copy_recovery_script = scripts.append
    step_dir = folder / f"stage{stage}"
    step_dir.mkdir(exist_ok=True)
    engine.save_checkpoint(str(folder), tag=step_dir.name, save_latest=False)
    engine.checkpoint_engine = own
    inner = getattr(engine.optimizer, "optimizer", None)
    facts = {
        "calls": sorted(set(calls)), "scripts": len(scripts), "gradients": gradients,
        "has_norm": norm is not None, "universal": engine.load_universal_checkpoint(),
        "inner": type(inner).__name__,
        "steps": [] if inner is None else [float(s["step"]) for s in inner.state.values()],
        "marks": {
            name: [
                hasattr(p, "ds_id"), getattr(p, "ds_numel", 0), [*getattr(p, "ds_shape", ())],
                p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0,
            ]
            for name, p in engine.module.named_parameters()
        },
        "loads": loads_of(engine.optimizer, stage) if stage else [],
        "files": {},
    }  # fmt: skip
    torch.distributed.barrier()
    for path in step_dir.iterdir():
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        content = torch.load(path, weights_only=False)
        keys = [*content, *content.get("optimizer_state_dict", ())]
        facts["files"][path.name] = [sorted(classes), sorted(keys)]
    engine.destroy()
    return facts


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(2, in_engines, str(tmp_path_factory.mktemp("engines")))[0]


@row(
    "deepspeed", "checkpoint_engine", "_copy_recovery_script", files=f"{CHECKPOINTS}saving.py",
    why="every file is hashed on its way to disk, and none is written beside the checkpoint",
    gone="a call that the writer lacks is an AttributeError in the first checkpoint; without the "
    "patch a recovery script lies beside the checkpoints",
)  # fmt: skip
def test_an_engine_saves_through_what_it_is_given(engines: dict[str, Any]) -> None:
    from dpo_dist.engine.checkpoints.shard_writer import ShardWriter

    for stage in (0, 2, 3):
        facts = engines[f"stage{stage}"]
        assert set(facts["calls"]) == {"makedirs", "create", "save", "is_decoupled", "commit"}
        assert set(facts["calls"]) <= set(dir(ShardWriter))
        assert facts["scripts"] == bool(stage), "the name that is patched is the one that is called"


@row(
    "deepspeed", "fp32_flat_groups", "single_partition_of_fp32_groups", "param_shapes",
    "shared_params", "buffer_names", "param_alignment_paddings", "optimizer_state_dict",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", files=f"{CHECKPOINTS}shard_reader.py",
    why="exports stream a checkpoint without DeepSpeed and without running its pickles",
    gone="export refuses the checkpoint: 'expected shards as this version of DeepSpeed writes "
    "them', and names the version to use",
)  # fmt: skip
def test_shards_have_these_files_keys_and_classes(engines: dict[str, Any]) -> None:
    from dpo_dist.engine.checkpoints.shard_reader import IGNORED_CLASSES

    model = {"module", "param_shapes", "shared_params", "buffer_names"}
    optimizer = {
        2: {"single_partition_of_fp32_groups", "param_alignment_paddings"},
        3: {"fp32_flat_groups"},
    }
    for stage in (0, 2, 3):
        files = engines[f"stage{stage}"]["files"]
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        assert model <= set(files[f"{prefix}mp_rank_00_model_states.pt"][1])
        for rank in (0, 1) if stage else ():
            classes, keys = files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]
            assert {"optimizer_state_dict"} | optimizer[stage] <= set(keys)
            assert set(classes) <= set(IGNORED_CLASSES)


@row(
    "deepspeed", "ds_id", "ds_numel", "ds_shape", "ds_tensor",
    files=f"{FORWARD}model_parts.py {MODEL}adapters.py {MODEL}quantized.py {MODEL}tiled_mlp.py "
    f"{CHECKPOINTS}resharding.py dpo_dist/engine/sharding/optimizers.py "
    "dpo_dist/engine/sharding/zero.py",
    why="a partitioned parameter looks empty: its marks tell that it is one, and what it holds",
    gone="ZeRO-3 fails at the head's first forward; counts of parameters become 0",
)  # fmt: skip
def test_partitioned_parameters_are_marked(engines: dict[str, Any]) -> None:
    assert engines["stage3"]["marks"]["policy.embed.weight"] == [True, 13 * 7, [13, 7], 46]
    assert engines["stage2"]["marks"]["policy.embed.weight"] == [False, 0, [], 0]


@row(
    "deepspeed", "deepspeed.utils", "set_z3_leaf_module", files=f"{MODEL}tiled_mlp.py",
    why="ZeRO-3 gathers an MLP with its layers around its tiles, whose number differs by rank",
    gone="train.tiled_mlp fails at the start with an import error; ranks would hang without it",
)  # fmt: skip
def test_a_module_is_marked_to_be_gathered_with_its_layers() -> None:
    import torch
    from deepspeed.utils import set_z3_leaf_module, z3_leaf_module

    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not z3_leaf_module(module)
    set_z3_leaf_module(module, True)
    assert z3_leaf_module(module) and not z3_leaf_module(module[0])


@row(
    "deepspeed", "set_gradient_accumulation_boundary", "scale_wrt_gas", "get_global_grad_norm",
    "was_step_applied", files="dpo_dist/engine/sharding/zero.py",
    why="a step's micro-batches hold as many pairs as their tokens allow: sums, not means",
    gone="training fails at its first backward; a norm that stage 0 keeps could be taken from it",
)  # fmt: skip
def test_gradients_are_plain_sums_and_float32_at_stage_0_keeps_no_norm(
    engines: dict[str, Any],
) -> None:
    first, second = engines["stage0"]["gradients"]
    assert second == pytest.approx(2 * first, rel=1e-6)
    assert {stage: engines[f"stage{stage}"]["has_norm"] for stage in (0, 2, 3)} == {
        0: False, 2: True, 3: True,
    }  # fmt: skip


@row(
    "deepspeed", "optimizer.optimizer", "load_universal_checkpoint",
    files=f"{CHECKPOINTS}checkpoint.py {CHECKPOINTS}shard_loader.py",
    why="on another number of ranks all sub-groups of ZeRO-3 share a step count; each gets its own",
    gone="a resume on another number of ranks fails, or its losses drift from the unbroken run's",
)  # fmt: skip
def test_the_optimizer_inside_counts_its_steps(engines: dict[str, Any]) -> None:
    for stage in (2, 3):
        facts = engines[f"stage{stage}"]
        assert facts["inner"] == "AdamW" and set(facts["steps"]) == {2.0}
        assert facts["universal"] is False
    assert len(engines["stage3"]["steps"]) > 1


@row(
    "deepspeed", "load_hp_checkpoint_state", "param_names", "bit16_groups", "_hp_mapping",
    "lp_fragment_address", "get_hp_fragment", "optim_fragment", "base_optimizer_state",
    files=f"{CHECKPOINTS}resharding.py {CHECKPOINTS}shard_reader.py",
    why="on another number of ranks a rank reads its share of each parameter out of the shards",
    gone="such a resume fails, or reads files that are not there; the same number still works",
)  # fmt: skip
def test_parameters_are_loaded_one_by_one(engines: dict[str, Any]) -> None:
    assert engines["stage3"]["loads"] == ["folder", "key", "param"]
    (per_parameter, mapped, names) = engines["stage2"]["loads"]
    assert per_parameter == ["folder", "tp_rank", "tp_world_size", "ep_rank", "ep_size"]
    assert {"lp_fragment_address", "get_hp_fragment", "optim_fragment"} <= set(mapped)
    assert "policy.scale" in names
    keys = engines["stage2"]["files"]["zero_pp_rank_0_mp_rank_00_optim_states.pt"][1]
    assert "base_optimizer_state" in keys


@row(
    "deepspeed", "/dev/shm/deepspeed_allreduce_buffer_", "LOCAL_SIZE", "DS_ACCELERATOR",
    files="dpo_dist/engine/distributed/collectives.py",
    why="CPU ranks share 66 MiB of memory each, under a name that DeepSpeed never removes",
    gone="memory of ended jobs stays in use until the machine starts again",
)  # fmt: skip
def test_cpu_ranks_share_memory_under_this_name(engines: dict[str, Any]) -> None:
    assert engines["buffer"], "no such name, so nothing would be removed"
    assert engines["accelerator"] == ["cpu", 2]


@row(
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "use_muon",
    files="dpo_dist/engine/sharding/optimizers.py",
    why="DeepSpeed's Muon is the one that works on partitions; it splits groups by this mark",
    gone="train.optimizer=muon fails at the start of training",
)  # fmt: skip
def test_muon_takes_its_parameters_by_a_mark() -> None:
    import torch
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    shared = {"lr": 0.1, "weight_decay": 0.0}
    marked = [
        {"params": [torch.nn.Parameter(torch.ones(2, 2))], "use_muon": True, "momentum": 0.9},
        {"params": [torch.nn.Parameter(torch.ones(2))], "use_muon": False, "betas": (0.9, 0.99)}
        | {"eps": 1e-8},
    ]
    optimizer = MuonWithAuxAdam([group | shared for group in marked])
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    with pytest.raises(AssertionError):
        MuonWithAuxAdam([{"params": [torch.nn.Parameter(torch.ones(2))]} | shared])


@row(
    "deepspeed", "DS_LOG_LEVEL", files="dpo_dist/run/logs.py",
    why="its banners would come between a run's own lines",
    gone="they come between them",
)  # fmt: skip
def test_its_loggers_level_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("deepspeed.utils.logging")
    assert spec is not None and spec.loader is not None
    monkeypatch.setenv("DS_LOG_LEVEL", "warning")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.logger.level == fresh.logging.WARNING


# peft


@functools.cache
def adapted() -> Any:
    """A model with every kind of adapted layer that an export merges."""
    import peft
    from support.tiny_models import tiny_model

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], target_parameters=["experts.down_proj"],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    return peft.get_peft_model(tiny_model("mixtral"), config)


@row(
    "peft", "peft.tuners.lora.layer", "peft.tuners.lora", "fan_in_fan_out", "parameter_name",
    "get_param", files=f"{MODEL}adapters.py dpo_dist/engine/export/weight_changes.py",
    why="merging streams weights from disk, so it has to know what an adapter does to them",
    gone="export fails at import; export.merge=false needs none of it",
)  # fmt: skip
def test_adapted_layers_tell_what_they_do() -> None:
    import torch
    from peft.tuners.lora import Embedding, Linear, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    kinds = {
        name.rsplit(".", 1)[-1]: module
        for name, module in adapted().named_modules()
        if isinstance(module, LoraLayer)
    }
    assert isinstance(kinds["embed_tokens"], Embedding) and isinstance(kinds["q_proj"], Linear)
    assert kinds["q_proj"].fan_in_fan_out is False
    experts = kinds["experts"]
    assert isinstance(experts, ParamWrapper) and experts.parameter_name == "down_proj"
    assert experts.get_param().shape == torch.Size([4, 32, 48])
    for module in kinds.values():
        assert module.scaling == {"default": 4.0} and module.use_dora == {"default": False}


@row(
    "peft", "peft.utils.other", "peft.tuners.tuners_utils", "modules_to_save", "original_module",
    "disable_adapters", "active_adapters",
    files=f"{FORWARD}model_parts.py dpo_dist/engine/export/weight_changes.py",
    why="log-probs come from the head's weight: the trained copy, and the old one while it is off",
    gone="scoring a policy with an adapter fails at import",
)  # fmt: skip
def test_a_saved_head_is_a_copy_beside_the_original() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    head = adapted().get_base_model().get_output_embeddings()
    assert isinstance(head, ModulesToSaveWrapper) and isinstance(head, AuxiliaryTrainingWrapper)
    assert not isinstance(head, BaseTunerLayer)
    copy = head.modules_to_save[head.active_adapters[0]]
    assert copy.weight.requires_grad and not head.original_module.weight.requires_grad
    assert head.disable_adapters is False
    with adapted().disable_adapter():
        assert head.disable_adapters is True


@row(
    "peft", "targeted_module_names", "targeted_parameter_names", files=f"{MODEL}adapters.py",
    why="a rank pattern that fits nothing is refused; peft would only warn",
    gone="adapter.rank_pattern fails at the start of training",
)  # fmt: skip
def test_what_is_adapted_is_listed_by_name() -> None:
    tuner = adapted().base_model
    assert "model.layers.0.self_attn.q_proj" in tuner.targeted_module_names
    assert "model.layers.0.mlp.experts.down_proj" in tuner.targeted_parameter_names


@row(
    "peft", "default", "base_model.model.", ".lora_magnitude_vector.",
    files="dpo_dist/engine/weights/adapter_file.py dpo_dist/engine/export/weight_changes.py",
    why="checkpoints and adapter files are matched by the names that peft gives parameters",
    gone="export and adapter.path say which names are in the file only and in the model only",
)  # fmt: skip
def test_parameters_and_files_have_these_names() -> None:
    import peft

    from dpo_dist.engine.weights.adapter_file import name_in_file

    trained = [name for name, p in adapted().named_parameters() if p.requires_grad]
    assert all(name.startswith("base_model.model.") for name in trained)
    expected = peft.get_peft_model_state_dict(adapted(), save_embedding_layers=False)
    assert sorted(map(name_in_file, trained)) == sorted(expected)


@row(
    "peft", "velora_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying",
    files="dpo_dist/engine/weights/adapter_file.py",
    why="settings that make an adapter more than low-rank changes are refused at the start",
    gone="a setting under a new name is not seen: its adapter would be continued as a plain one",
)  # fmt: skip
def test_refused_settings_are_fields_whose_default_is_plain() -> None:
    import peft

    from dpo_dist.engine.weights.adapter_file import _PLAIN

    defaults = vars(peft.LoraConfig())
    assert {name: defaults[name] in plain for name, plain in _PLAIN.items()} == dict.fromkeys(
        _PLAIN, True
    )


# datasets


@row(
    "datasets", "_fingerprint", files="dpo_dist/data/rows/table_rows.py",
    why="the identity of rows that have no file, by which pairs count as stale",
    gone="prepare fails for such rows",
)  # fmt: skip
def test_rows_without_a_file_have_a_fingerprint_of_their_content() -> None:
    from datasets import Dataset

    one, same, other = (Dataset.from_dict({"n": numbers}) for numbers in ([1, 2], [1, 2], [1, 3]))
    assert one.cache_files == []
    assert one._fingerprint == same._fingerprint != other._fingerprint


@row(
    "datasets", "_data_files", "_fingerprint", "_format_columns", "_format_kwargs", "_format_type",
    "_output_all_columns", "_split", files="dpo_dist/data/screening/write_pairs.py",
    why="a pairs folder opens with datasets.load_from_disk; it is written without the library",
    gone="users' load_from_disk fails; training reads the Arrow file itself",
)  # fmt: skip
def test_a_data_set_on_disk_has_these_keys(tmp_path: Path) -> None:
    from datasets import Dataset

    from dpo_dist.data.screening.write_pairs import _DATASETS_STATE

    Dataset.from_dict({"n": [1]}).save_to_disk(str(tmp_path))
    state = json.loads((tmp_path / "state.json").read_text())
    assert state | {"_fingerprint": ""} == _DATASETS_STATE


@row(
    "datasets", "config.data_files", "builder.hash", files="dpo_dist/data/rows/stream_rows.py",
    why="the identity of a stream: its files, whose names hold the hub's commit",
    gone="prepare fails for sources with streaming=true",
)  # fmt: skip
def test_a_builder_lists_its_files(tmp_path: Path) -> None:
    from datasets import load_dataset_builder

    (tmp_path / "train.jsonl").write_text('{"n": 1}\n')
    builder = load_dataset_builder(str(tmp_path))
    assert builder.config.data_files["train"] == [str(tmp_path / "train.jsonl")]
    assert isinstance(builder.hash, str)


# bitsandbytes


@row(
    "bitsandbytes", "support_avx512bf16_for_cpu", "quant_state", ".weight.",
    files=f"{MODEL}quantized.py {CHECKPOINTS}shard_writer.py",
    why="packed weights are told apart and counted unpacked; CPUs must not pack them anew",
    gone="a packed base is counted by its bytes, and written into every checkpoint",
)  # fmt: skip
def test_a_packed_weight_knows_its_shape_and_brings_scales_along() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert isinstance(layer.support_avx512bf16_for_cpu, bool | int)
    assert layer.weight.quant_state.shape.numel() == 64 * 32
    own, *scales = layer.state_dict()
    assert own == "weight" and scales and all(name.startswith("weight.") for name in scales)


# Ray


@row(
    "ray", "ray._private", "get_draining_nodes", files="launch/ray_*.py",
    why="a node to be taken away is told early; ray.train's own way is a barrier of all workers",
    gone="the launcher fails at import; shown on a cluster by "
    "test_a_node_that_is_drained_is_left_without_a_step_done_twice",
)  # fmt: skip
def test_nodes_to_be_drained_are_listed_by_id() -> None:
    from ray._private import state

    signature = inspect.signature(state.state.get_draining_nodes)
    assert not signature.parameters and typing.get_args(signature.return_annotation) == (str, int)


@row(
    "ray", "ray.train.backend", "share_cuda_visible_devices",
    "ray.train.v2.api.data_parallel_trainer", files="launch/ray_*.py",
    why="workers are processes that start ranks: no framework of Ray Train, all GPUs visible",
    gone="the launcher fails at import",
)  # fmt: skip
def test_a_trainer_takes_a_backend_of_our_own() -> None:
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert Backend.share_cuda_visible_devices is False and BackendConfig().backend_cls is Backend
    inspect.signature(DataParallelTrainer).bind(
        print, train_loop_config={}, backend_config=None, scaling_config=None, run_config=None
    )


@row(
    "ray", "RAY_JOB_CONFIG_JSON_ENV_VAR", "job_submission_id", "RAY_TRAIN_V2_ENABLED",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
    files="launch/ray_*.py",
    why="which job holds a run folder, by the id that `ray job stop` takes; switches of Ray",
    gone="a refusal names Ray's inner job id; unknown switches change nothing",
)  # fmt: skip
def test_the_environment_of_a_job() -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY
    from ray.train.v2._internal import constants

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    assert JOB_ID_METADATA_KEY == "job_submission_id"
    assert hasattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    assert constants.V2_ENABLED_ENV_VAR == "RAY_TRAIN_V2_ENABLED"


# what writes and reads for others


@row(
    "tensorboard", "tensorboard.compat.proto", "tensorboard.compat.proto.summary_pb2",
    "tensorboard.compat.proto.tensor_pb2", "tensorboard.compat.proto.types_pb2",
    "tensorboard.plugins.text.metadata", "tensorboard.summary.writer.event_file_writer",
    files="dpo_dist/metrics/writer.py",
    why="event files without torch's writer, which takes torch to import",
    gone="set logging.tensorboard=false; metrics.jsonl has the same numbers",
)  # fmt: skip
def test_events_are_written_with_tensorboards_own_messages(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    text = Summary.Value(
        tag="a", metadata=create_summary_metadata(display_name="a", description=""),
        tensor=TensorProto(dtype=DT_STRING, string_val=[b"words"]),
    )  # fmt: skip
    values = [text, Summary.Value(tag="loss", simple_value=0.5)]
    writer = EventFileWriter(str(tmp_path))
    writer.add_event(event_pb2.Event(wall_time=1.0, step=3, summary=Summary(value=values)))
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(3, 0.5)]
    assert read.Tensors("a")[0].tensor_proto.string_val == [b"words"]


@row(
    "wandb", "x_disable_meta", "x_disable_stats", "x_disable_machine_info", "x_save_requirements",
    files="dpo_dist/metrics/wandb_log.py",
    why="nothing of the machine or its user is sent",
    gone="wandb refuses the setting and training with logging.wandb=true fails, so nothing leaks",
)  # fmt: skip
def test_what_is_sent_can_be_held_back() -> None:
    import wandb
    from pydantic import ValidationError

    switches = dict.fromkeys(("x_disable_meta", "x_disable_stats", "x_disable_machine_info"), True)
    settings = wandb.Settings(**switches, x_save_requirements=False)
    assert all(getattr(settings, name) for name in switches) and not settings.x_save_requirements
    with pytest.raises(ValidationError, match="x_no_such_switch"):
        wandb.Settings(x_no_such_switch=True)  # pyright: ignore[reportCallIssue]


@row(
    "lm_eval", "_stderr", "n-samples", "effective", files="dpo_dist/commands/harness.py",
    why="results are keyed 'metric,filter', their errors 'metric_stderr,filter'",
    gone="harness.json has no rows or no errors",
)  # fmt: skip
def test_results_are_keyed_by_metric_and_filter() -> None:
    from lm_eval import evaluator_utils, result_schema
    from lm_eval.api.metrics import mean

    task: Any = SimpleNamespace(aggregation=lambda: {"acc": mean}, task_name="colors")
    scores, count = evaluator_utils._compute_task_aggregations(task, {("acc", "none"): [1.0, 0.0]})
    assert scores["acc,none"] == 0.5 and scores["acc_stderr,none"] == pytest.approx(0.5)
    assert count == 2
    assert "n-samples" in result_schema.EvalResults.__annotations__
    assert "effective" in result_schema._SampleCount.__annotations__


@row(
    "huggingface_hub", "HTTPError", "server_message", files="dpo_dist/model_files/hub.py",
    why="a push that is refused says in the hub's own words why",
    gone="push fails at import, or shows the client's text in place of the hub's",
)  # fmt: skip
def test_the_hubs_refusals_carry_its_words() -> None:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    request = httpx2.Request("GET", "http://hub")
    response = httpx2.Response(403, request=request)
    error = HfHubHTTPError("no", response=response, server_message="no right to write")
    assert isinstance(error, HTTPError)
    assert (error.server_message, error.response.status_code) == ("no right to write", 403)


# programs whose output is read


@row(
    "nvidia-smi", "nvidia-smi", "GPU ", files="dpo_dist/run/local_ranks.py",
    why="how many ranks to start, without loading torch",
    gone="ranks for CPUs are started; local.workers sets the number",
)  # fmt: skip
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_nvidia_smi_lists_a_gpu_a_line() -> None:
    import torch

    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    assert len(found) >= torch.cuda.device_count()


@row(
    "Slurm", "scontrol", "NodeAddr=", "Command=", files="slurm/dpo.sh slurm/sweep_table.sh",
    why="a job's own script, its nodes in rank order, and the address of the first",
    gone="the job ends at its first line; shown on a cluster by tests/clusters/test_slurm.py",
)  # fmt: skip
@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs slurm (slurm-wlm)")
def test_node_lists_are_spelled_out_in_order(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", "n[9-10],m7"],
        env=os.environ | {"SLURM_CONF": str(conf)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.split() == ["n9", "n10", "m7"]


# the code against the register

FOLDERS = ("dpo_dist", "launch", "slurm", "examples", "benchmarks", "tests/support/devices")
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh")
}
LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "huggingface_hub", "lm_eval", "peft",
    "ray", "tensorboard", "torch", "transformers", "trl", "wandb",
)  # fmt: skip
# Modules below a library's own that its documentation has; any other one needs a row.
DOCUMENTED = {
    "_current_frames",
    "bitsandbytes.functional",
    "bitsandbytes.optim", "deepspeed.ops.adam", "deepspeed.utils.zero_to_fp32",
    "huggingface_hub.errors", "lm_eval.evaluator",
    "lm_eval.models.huggingface", "lm_eval.tasks", "ray.exceptions", "ray.train",
    "ray.train.collective", "ray.util.metrics", "ray.util.scheduling_strategies",
    "torch.autograd.function", "torch.distributed", "torch.nn", "torch.nn.attention.varlen",
    "torch.nn.functional", "torch.utils.cpp_extension", "torch.utils.flop_counter",
    "transformers.integrations.deepspeed", "transformers.optimization", "transformers.utils",
}  # fmt: skip
OF_TEXTS = ("endswith", "startswith", "removesuffix", "removeprefix")
HIDDEN = re.compile(r"_[a-z]\w+")


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse(source))]


def imported(node: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of an import."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(str(node.module), alias.name) for alias in node.names]
    return []


def private_names(source: str) -> set[str]:
    """What a Python file takes from others without a promise, spelled as a row spells it."""
    nodes, found = nodes_of(source), set[str]()
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    parts |= {
        id(value)
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        for value in node.args
        if node.func.attr in OF_TEXTS
    }
    for node in nodes:
        for module, name in imported(node):
            if module.split(".")[0] in LIBRARIES:
                hidden = HIDDEN.fullmatch(name) or "._" in module
                found |= {module} if hidden or "." in module else set()
                found |= {name} if HIDDEN.fullmatch(name) else set()
        if isinstance(node, ast.Attribute) and HIDDEN.fullmatch(node.attr):
            found |= set() if ast.unparse(node.value) in ("self", "cls", "os") else {node.attr}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            hidden = HIDDEN.fullmatch(node.value) and id(node) not in parts
            found |= {node.value} if hidden else set()
    return found - own - DOCUMENTED


def is_used(name: str, file: str) -> bool:
    """As a name, an attribute, a keyword or a text; no plain word: inside a text too."""
    source = FILES[file]
    if not file.endswith(".py"):
        return name in source
    spelled, texts = spelling(source)
    inside = not name.isidentifier() or name.startswith("_")
    return name in spelled or any(name == text or (inside and name in text) for text in texts)


@functools.cache
def spelling(source: str) -> tuple[set[str], list[str]]:
    """(names that a Python file uses, its texts without docstrings)"""
    nodes = nodes_of(source)
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    spelled, texts = set[str](), list[str]()
    for node in nodes:
        for module, name in imported(node):
            spelled |= {module, name}
        if isinstance(node, ast.Attribute):
            before = ast.unparse(node.value).split(".")[-1]
            spelled |= {node.attr, f"{before}.{node.attr}"}
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            spelled.add(node.arg)
        elif isinstance(node, ast.Name):
            spelled.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts += [] if id(node) in docstrings else [node.value]
    return spelled, texts


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: entry.shown_by)
def test_a_row_is_of_use_where_it_says(entry: Row) -> None:
    using = {
        name: [f for f in FILES if entry.covers(f) and is_used(name, f)] for name in entry.names
    }
    assert all(using.values()), f"nothing there uses {[n for n, f in using.items() if not f]}"
    for pattern in entry.files:
        assert any(fnmatch.filter(files, pattern) for files in using.values()), pattern


def test_what_is_private_has_a_row() -> None:
    found = {
        (file, name)
        for file in FILES
        if file.endswith(".py")
        for name in private_names(FILES[file])
    }
    entered = {
        (file, name.split(".")[-1])
        for row in ROWS
        for name in row.names
        for file in FILES
        if row.covers(file)
    }
    missing = sorted((f, n) for f, n in found if (f, n.split(".")[-1]) not in entered)
    assert not missing, f"no row names {missing}: enter what they are for and show what they do"
    assert len(found) > 30


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray._private.state", {"ray._private.state"}),
        ("from ray._private import state", {"ray._private"}),
        ("from torch import _C", set()),
        ("from torch import _dynamo", {"torch", "_dynamo"}),
        ("from peft.tuners import lora", {"peft.tuners"}),
        ("from torch.nn import functional", set()),
        ("config._name = 1", {"_name"}),
        ("getattr(config, '_name', None)", {"_name"}),
        ("self._name, cls._name, os._exit", set()),
        ("def _own(): ...\nmodule._own()", set()),
        ("f'{name}_ended', name.removesuffix('_ended')", set()),
    ],
)
def test_the_scan_finds_what_it_is_for(source: str, expected: set[str]) -> None:
    assert private_names(source) == expected
