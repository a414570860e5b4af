"""What the planner proposes for a run that does not fit."""

from dataclasses import replace

from support.planner_setups import LLAMA_8B, setup_of

from dpo_dist.engine.sharding import ds_config
from dpo_dist.planning.memory import RESERVE_BYTES, estimate_memory
from dpo_dist.planning.remedies import Alternatives, find_remedies
from dpo_dist.planning.setup import sharding_of
from dpo_dist.planning.sizes import GIB


def test_remedies_lower_the_peak_and_those_that_fit_come_first() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 1)
    limit = 70 * GIB
    offload = sharding_of(ds_config.read_sharding("zero3_offload"))
    others = Alternatives(
        shardings={"zero3": setup.sharding, "zero3_offload": offload},
        with_adapter=replace(LLAMA_8B, num_trained=10**7, head_trained=False),
        quantized=None,
        least_tokens=1024,
    )
    found = find_remedies(setup, limit, others)
    assert all(remedy.peak_bytes < estimate_memory(setup).peak_bytes for remedy in found)
    assert all(r.fits == (r.peak_bytes + RESERVE_BYTES <= limit) for r in found)
    assert [remedy.fits for remedy in found] == sorted((r.fits for r in found), reverse=True)
    changes = {remedy.change: remedy.fits for remedy in found}
    assert changes["train.deepspeed=zero3_offload"] and changes["adapter.rank=16 (LoRA)"]
    assert "train.optimizer=adamw_8bit" in changes
    assert changes["4 ranks"] and "2 ranks" not in changes  # the fewest that fit
    assert not changes["train.micro_batch_tokens=1024"]  # the smallest is not enough
    assert "train.deepspeed=zero3" not in changes  # changes nothing


def test_long_rows_are_helped_by_tiles_and_by_offloaded_inputs() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8)
    setup = replace(setup, micro_batch_tokens=131_072)
    others = Alternatives(shardings={}, with_adapter=None, quantized=None, least_tokens=131_072)
    found = {r.change: r for r in find_remedies(setup, 64 * GIB, others)}
    both = found["train.tiled_mlp=8192 train.offload_activations=true"]
    tiled = found["train.tiled_mlp=1024"]  # the smallest is not enough
    assert both.fits and not tiled.fits
    each = replace(setup, mlp_tile=1024)
    assert tiled.peak_bytes == estimate_memory(each).peak_bytes
    assert not found["train.offload_activations=true"].fits
    already = replace(setup, mlp_tile=1024, offload_activations=True)
    changes = {r.change for r in find_remedies(already, 1 * GIB, others)}
    assert not any("tiled" in change or "activations" in change for change in changes)


def test_long_rows_are_helped_by_ranks_that_share_them() -> None:
    setup = setup_of(LLAMA_8B, ds_config.read_sharding("zero3"), "bfloat16", 8)
    setup = replace(setup, micro_batch_tokens=131_072)
    others = Alternatives(shardings={}, with_adapter=None, quantized=None, least_tokens=131_072)
    found = {r.change: r for r in find_remedies(setup, 64 * GIB, others)}
    shared = found["train.sequence_parallel=4"]  # the fewest that fit
    assert shared.fits and not any(f"parallel={n}" in change for n in (2, 8) for change in found)
    assert shared.peak_bytes == estimate_memory(replace(setup, ranks_per_row=4)).peak_bytes
    nine = replace(LLAMA_8B, num_heads=9)
    for other in (replace(setup, shape=nine), replace(setup, padded=True)):
        changes = {r.change for r in find_remedies(other, 64 * GIB, others)}
        assert not any("sequence_parallel" in change for change in changes)
