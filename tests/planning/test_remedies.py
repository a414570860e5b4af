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
