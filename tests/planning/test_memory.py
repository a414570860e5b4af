"""Estimated memory against the bytes that DeepSpeed and autograd really hold."""

import contextlib
import gc
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.planner_setups import LLAMA_8B, setup_of
from support.ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_dist.config.training_section import AdapterSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import join_team
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.model.model_shape import shape_of
from dpo_dist.engine.model.recompute import recompute_layers
from dpo_dist.engine.model.tiled_mlp import tile_mlps
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.planning.memory import estimate_memory, fits, longest_pair
from dpo_dist.planning.memory_transient import layer_bytes
from dpo_dist.planning.setup import Setup, sharding_of
from dpo_dist.planning.sizes import GIB, Size, total
from dpo_dist.run.topology import from_environment

BUCKET = 20_000  # elements; small beside the model's 723,008


class NewBytes(TorchDispatchMode):
    """Counts bytes of the storages that are made while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, is_new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, tensor: Any, is_new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes() if is_new else 0
            self.now += self.sizes[storage._cdata]
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, identity: int) -> None:
        self.now -= self.sizes.pop(identity)


def bytes_alive() -> int:
    """Bytes of all storages that a Python object reaches."""
    gc.collect()
    sizes: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            with contextlib.suppress(Exception):
                if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                    add(thing)
                    if thing.is_leaf and thing.grad is not None:
                        add(thing.grad)
                    if hasattr(thing, "ds_tensor"):
                        add(thing.ds_tensor)
    return sum(sizes.values())


def llama(layers: int, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=512,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def sharding_config(name: str, dtype: str, world_size: int) -> dict[str, Any]:
    """The built-in JSON with buckets small enough for a tiny model."""
    train = TrainSection(deepspeed=name)  # pyright: ignore[reportCallIssue]
    config = ds_config.training_config(train, dtype, world_size)
    zero_section = config["zero_optimization"]
    small = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if zero_section["stage"] == 3:
        small |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_max_live_parameters": BUCKET,
            "stage3_max_reuse_distance": BUCKET,
            "stage3_param_persistence_threshold": 0,
        }
    if "zero_hpz_partition_size" in zero_section:
        small["zero_hpz_partition_size"] = world_size
    zero_section |= {key: size for key, size in small.items() if zero_section["stage"]}
    return config


def resident_on_a_rank(name: str, dtype: str, adapter: bool) -> dict[str, Any]:
    """Bytes a rank holds in its second step, and what its update adds; and its shape."""
    import deepspeed

    with collectives.process_group(from_environment()):
        world_size = from_environment().world_size
        config = sharding_config(name, dtype, world_size)
        before = bytes_alive()
        sharded = config["zero_optimization"]["stage"] == 3
        partitioned = (
            deepspeed.zero.Init(config_dict_or_path=config) if sharded else contextlib.nullcontext()
        )
        llama_config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=512,
            use_cache=False,
        )
        with partitioned:
            policy: Any = AutoModelForCausalLM.from_config(
                llama_config, dtype=getattr(torch, dtype)
            )
        if adapter:
            policy = add_adapter(policy, AdapterSection(rank=8), "base")  # pyright: ignore
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in policy.parameters()]
        train = TrainSection(deepspeed=name)  # pyright: ignore[reportCallIssue]
        engine = zero.start_training(policy, config, train, 10)
        for group in engine.optimizer.param_groups:
            group["fused"] = True  # as on a GPU: an update without buffers of its own
        held: dict[str, Any] = {
            "num_parameters": sum(n for n, _ in counts),
            "num_trained": sum(n for n, trains in counts if trains),
        }
        token_ids = torch.randint(0, 512, (1, 8))
        for _ in range(2):
            sizes = []
            for last in (False, True):
                loss = engine(input_ids=token_ids).logits.float().mean()
                zero.backward(engine, loss, last=last, world_size=world_size)
                del loss
                sizes.append(bytes_alive() - before)
            with NewBytes() as update:
                zero.update(engine)
            if config["zero_optimization"]["stage"] < 2 and dtype == "bfloat16":
                # between micro-batches its float32 sum, a transient, takes the gradient's place
                sizes = [sizes[0] - 2 * held["num_trained"]]
            held |= {"resident": max(sizes), "update": update.peak}
        return held


def sizes_of(setup: Setup) -> dict[str, Size]:
    memory = estimate_memory(setup)
    return {s.name: s for s in (*memory.resident, *memory.micro_batch, *memory.update)}


@pytest.mark.parametrize(
    ("name", "dtype", "adapter"),
    [
        pytest.param("zero0", "bfloat16", False, marks=pytest.mark.slow),
        pytest.param("zero1", "bfloat16", False, marks=pytest.mark.slow),
        ("zero2", "bfloat16", True),
        ("zero3", "bfloat16", False),
        pytest.param("zero3", "float32", False, marks=pytest.mark.slow),
        pytest.param("zero3_hpz", "bfloat16", False, marks=pytest.mark.slow),
        pytest.param("zero3_offload", "bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_resident_memory_is_what_deepspeed_holds(name: str, dtype: str, adapter: bool) -> None:
    held = run_ranks(2, resident_on_a_rank, name, dtype, adapter)[0]
    shape = replace(
        LLAMA_8B, num_parameters=held["num_parameters"], num_trained=held["num_trained"]
    )
    setup = setup_of(shape, sharding_config(name, dtype, 2), dtype, 2)
    memory = estimate_memory(setup)
    # ZeRO-2 gives its buckets back between two backwards, so they may or may not be there, and the
    # float32 copy of a bucket lives while it is reduced.
    most = total(memory.resident) + total(memory.host) / 2
    passing = ("reduce_buckets", "reduced_bucket")
    buckets = sum(size.num_bytes for size in memory.resident if size.name in passing)
    assert 0.99 * (most - buckets) <= held["resident"] <= 1.01 * most
    if not setup.sharding.offload_optimizer and setup.sharding.secondary_ranks == 1:
        assert held["update"] == pytest.approx(total(memory.update), rel=0.03, abs=10_000)


def test_truth_03_the_float32_copy_of_a_bucket_is_counted() -> None:
    config = sharding_config("zero3", "bfloat16", 2)
    setup = setup_of(LLAMA_8B, config, "bfloat16", 2)
    copy = 4 * config["zero_optimization"]["reduce_bucket_size"]
    assert sizes_of(setup)["reduced_bucket"].num_bytes == copy
    for other in (config | {"communication_data_type": "bf16"}, config):
        dtype = "bfloat16" if other is not config else "float32"
        assert "reduced_bucket" not in sizes_of(setup_of(LLAMA_8B, other, dtype, 2))


def pairs_of(seed: int) -> Any:
    chance = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 512, (count,), generator=chance).tolist()

    return pack_pairs([(ids(256), ids(128), ids(128)) for _ in range(4)])


def kept_and_peak(
    layers: int, checkpointing: bool, tile: int | None = None, offload: bool = False
) -> tuple[float, float]:
    """Bytes a token that autograd keeps after a float32 forward, and the peak of the backward.

    What is offloaded does not count as kept, and on a CPU it counts in the peak.
    """
    model = llama(layers, torch.float32)
    tile_mlps(model, tile)
    if checkpointing:
        recompute_layers(model, offload=offload)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scorer, packed = PairScorer(model), pairs_of(0)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sums = scorer(packed)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del sums
    kept.clear()
    with NewBytes() as new:
        scorer(packed).sum().backward()
    return size / packed.num_tokens, new.peak / packed.num_tokens


def test_a_layer_keeps_what_the_formula_says() -> None:
    few, many = kept_and_peak(2, False)[0], kept_and_peak(6, False)[0]
    shape = shape_of(llama(2, torch.float32))
    assert (many - few) / 4 == pytest.approx(layer_bytes(shape, 4), rel=0.01)


def test_gradient_checkpointing_keeps_the_input_of_a_layer() -> None:
    few, many = kept_and_peak(2, True)[0], kept_and_peak(6, True)[0]
    assert (many - few) / 4 == pytest.approx(4 * 64, rel=1e-3)


def test_nothing_of_an_offloaded_layer_is_kept() -> None:
    few, many = (kept_and_peak(layers, True, offload=True)[0] for layers in (2, 6))
    assert many == few


@pytest.mark.slow
def test_an_mlp_in_tiles_keeps_its_input() -> None:
    few, many = (kept_and_peak(layers, False, tile=64)[0] for layers in (2, 6))
    inner = 4 * 4 * 224  # gate, activation, up and product
    expected = layer_bytes(shape_of(llama(2, torch.float32)), 4) - inner
    assert (many - few) / 4 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tile", [None, 128])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_micro_batch_is_just_below_the_estimate(
    checkpointing: bool, tile: int | None
) -> None:
    layers = 6
    setup = replace(
        setup_of(
            shape_of(llama(layers, torch.float32)),
            {"zero_optimization": {"stage": 0}},
            "float32",
            1,
        ),
        checkpointing=checkpointing,
        micro_batch_tokens=pairs_of(0).num_tokens,
        mlp_tile=tile or 0,
    )
    sizes = sizes_of(setup)
    names = ("activations", "tile_gradients")
    estimated = sum(sizes[name].num_bytes for name in names if name in sizes)
    estimated /= setup.micro_batch_tokens
    measured = kept_and_peak(layers, checkpointing, tile)[1]
    assert measured <= estimated <= 1.25 * measured


def test_left_out_keys_have_deepspeeds_defaults() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), sharding_of({"zero_optimization": {"stage": 3}})
    assert (ours.reduce_bucket, ours.prefetch_bucket, ours.max_live, ours.sub_group) == (
        theirs.reduce_bucket_size,
        theirs.prefetch_bucket_size,
        theirs.max_live_parameters,
        theirs.sub_group_size,
    )
    assert not ours.offload_optimizer and ours.secondary_ranks == 1


def test_sizes_carry_their_arithmetic() -> None:
    sizes = sizes_of(setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8))
    optimizer = sizes["optimizer"]
    assert optimizer.arithmetic == "12 bytes x 8.03 B trained parameters / 8 ranks"
    assert optimizer.num_bytes == 12 * 8_030_261_248 // 8
    assert sizes["activations"].arithmetic == (
        "16,384 tokens x (32 layers x 8,192 + 212,992 of a recomputed layer + 73,728 of gradients"
        " + 49,152 after the last layer) bytes"
    )


def test_a_rank_alone_gathers_nothing() -> None:
    sharding = ds_config.read_sharding("zero3")
    assert "gathered_parameters" not in sizes_of(setup_of(LLAMA_8B, sharding, "bfloat16", 1))
    assert "gathered_parameters" in sizes_of(setup_of(LLAMA_8B, sharding, "bfloat16", 2))


def test_long_pairs_in_numbers() -> None:
    """What tiles and offload leave of a row of 131,072 tokens in an 8B, and where the rest goes."""
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8)
    long = replace(setup, micro_batch_tokens=131_072)
    tiled = replace(long, mlp_tile=4096)
    both = replace(tiled, offload_activations=True)
    assert sizes_of(tiled)["activations"].arithmetic == (
        "131,072 tokens x (32 layers x 8,192 + 98,304 of a recomputed layer + 16,384 of gradients"
        " + 49,152 after the last layer) bytes + 4,096 tokens of a tile x 172,032 bytes"
    )
    found = [sizes_of(each)["activations"].num_bytes for each in (long, tiled, both)]
    assert found[0] - found[1] == (131_072 - 4096) * 172_032
    assert found[1] - found[2] == 131_072 * 30 * 8192
    assert sizes_of(tiled)["tile_gradients"].arithmetic == (
        "6 bytes x 176 M trained parameters of an MLP"
    )
    (host,) = estimate_memory(both).host
    assert (host.name, host.num_bytes) == ("layer_inputs", 8 * 32 * 131_072 * 8192)
    assert host.arithmetic == ("8 ranks of a node x 32 layers x 131,072 tokens x 8,192 bytes")
    experts = replace(long, shape=replace(LLAMA_8B, experts_per_token=2), mlp_tile=4096)
    assert sizes_of(experts) == sizes_of(replace(experts, mlp_tile=0))


def test_scoring_in_tiles_has_attention_as_its_widest_place() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 1)
    setup = replace(setup, scoring_tokens=32_768)
    found = [
        estimate_memory(replace(setup, mlp_tile=tile)).evaluation[0].arithmetic
        for tile in (0, 4096, 16_384)
    ]
    assert found == [
        "32,768 tokens x 110,592 bytes",
        "32,768 tokens x 57,344 bytes",
        "32,768 tokens x 24,576 bytes + 16,384 tokens of a tile x 86,016 bytes",
    ]


def test_the_longest_pair_fits_and_one_token_more_does_not() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8)
    lengths = []
    for each in (setup, replace(setup, mlp_tile=4096, offload_activations=True)):
        found = longest_pair(each, 80 * GIB)
        peaks = [
            estimate_memory(replace(each, micro_batch_tokens=found.tokens + more)).peak_bytes
            for more in (0, 1)
        ]
        assert [fits(peak, 80 * GIB) for peak in peaks] == [True, False]
        lengths.append(found.tokens)
    assert lengths[1] > 2 * lengths[0]
    assert longest_pair(setup, 8 * GIB).tokens == 0


def test_ranks_that_share_a_row_have_a_slice_of_its_activations() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 32)
    setup = replace(setup, micro_batch_tokens=131_072, scoring_tokens=131_072)
    shared = {ranks: replace(setup, ranks_per_row=ranks) for ranks in (1, 8, 16, 32)}
    sizes = {ranks: sizes_of(each) for ranks, each in shared.items()}
    alone = sizes.pop(1)
    assert sizes[8]["activations"].num_bytes * 8 == alone["activations"].num_bytes
    assert sizes[8]["activations"].arithmetic == (
        "16,384 tokens of 131,072 x (32 layers x 8,192 + 212,992 of a recomputed layer + 73,728 of "
        "gradients + 49,152 after the last layer) bytes"
    )
    # 8 key-value heads on 16 and 32 ranks are there twice and four times
    added = [2 * 4 * 1024 * (131_072 // 16), 3 * 2 * 4 * 1024 * (131_072 // 32)]
    for ranks, more in zip((16, 32), added, strict=True):
        assert sizes[ranks]["activations"].num_bytes == (
            alone["activations"].num_bytes // ranks + more
        )
    for name in sizes[8].keys() - {"activations", "head"}:  # ZeRO knows nothing of groups
        assert sizes[8][name].num_bytes == alone[name].num_bytes
    padded = replace(shared[8], padded=True)
    assert padded.tokens_of_rank(100) == 100  # two sequences a pair, and a rank each


def test_a_longer_pair_fits_when_ranks_share_it() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8)
    lengths = []
    for ranks in (1, 2, 8):
        each = replace(setup, ranks_per_row=ranks)
        found = longest_pair(each, 80 * GIB)
        peaks = [
            estimate_memory(replace(each, micro_batch_tokens=found.tokens + more)).peak_bytes
            for more in (0, 1)
        ]
        assert [fits(peak, 80 * GIB) for peak in peaks] == [True, False]
        assert found.arithmetic.startswith(
            f"tokens = {ranks} ranks x (" if ranks > 1 else "tokens = ("
        )
        lengths.append(found.tokens)
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=1e-3)
    assert lengths[2] == pytest.approx(8 * lengths[0], rel=1e-3)


def shared_peak(layers: int, recomputed: bool) -> float:
    """Most bytes a token of the row that a micro-batch adds on this rank beside its gradients."""
    with collectives.process_group(from_environment()):
        model: Any = llama(layers, torch.float32)
        if recomputed:
            recompute_layers(model)
        scorer = PairScorer(model.train(), team=join_team(2))
        packed = pairs_of(0)
        score_pairs(scorer, packed).sum().backward()  # the gradients are there from now on
        with NewBytes() as new:
            score_pairs(scorer, packed).sum().backward()
        return new.peak / packed.num_tokens


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_peak_of_a_shared_row_is_just_below_the_estimate(recomputed: bool) -> None:
    layers, tokens = 6, pairs_of(0).num_tokens
    sharding = {"zero_optimization": {"stage": 0}}
    setup = setup_of(shape_of(llama(layers, torch.float32)), sharding, "float32", 2)
    setup = replace(setup, checkpointing=recomputed, micro_batch_tokens=tokens, ranks_per_row=2)
    estimated = sizes_of(setup)["activations"].num_bytes / tokens
    measured = max(run_ranks(2, shared_peak, layers, recomputed))
    assert measured <= estimated <= 1.25 * measured, (measured, estimated)
