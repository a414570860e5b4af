"""The entries of a plan, group by group, from the config and the estimates.

`start_adapter` is the adapter that training continues; `limit_gib` the memory of one GPU, None
where it is not known; `counts` None until the pairs are prepared.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.planning.flops import flops_per_token
from dpo_dist.planning.memory import RESERVE_BYTES, LongestPair, MemoryEstimate, fits
from dpo_dist.planning.run_plan import Entry, spelled
from dpo_dist.planning.setup import ModelShape, PairCounts, Setup
from dpo_dist.planning.sizes import GIB, Size, in_gib, shortened, total

NO_PAIRS = "known after `dpo-dist prepare`"


def run_entries(
    config: RunConfig, setup: Setup, ranks_why: str, start_adapter: Path | None
) -> list[Entry]:
    """The model, what of it trains, and the ranks, with where their number comes from."""
    shape, adapter = setup.shape, config.adapter
    if adapter is None:
        trained = "all"
    elif start_adapter is not None:
        trained = f"the adapter {adapter.path}"
    else:
        patterns = (f", {name} {rank}" for name, rank in adapter.rank_pattern.items())
        trained = f"LoRA of rank {adapter.rank}{''.join(patterns)}"
    longer = config.model.add_tokens or config.model.pad_vocab_to_multiple
    return [
        Entry("model", config.model.path),
        Entry("num_parameters", shape.num_parameters),
        *_active_parameters(shape),
        Entry("num_trained_parameters", shape.num_trained, trained),
        *([Entry("vocab_size", shape.vocab_size, "with model.add_tokens")] if longer else []),
        Entry("num_ranks", setup.world_size, ranks_why),
        *_ranks_per_row(setup),
        Entry("zero_stage", setup.sharding.stage, f"train.deepspeed {config.train.deepspeed}"),
        Entry("dtype", config.model.dtype, f"{setup.dtype_bytes} bytes"),
    ]


def _active_parameters(shape: ModelShape) -> list[Entry]:
    """Of a mixture of experts, what a token is multiplied with: its FLOPs count these."""
    experts, taken = shape.num_experts, shape.experts_per_token
    if not experts:
        return []
    passed_by = round(shape.num_in_experts * (experts - taken) / experts)
    beside = shape.num_parameters - shape.num_active - passed_by
    why = (
        f"= {shortened(shape.num_parameters)} - {shortened(passed_by)} in the {experts - taken} of "
        f"{experts} experts that a token passes by - {shortened(beside)} of embedding and vectors"
    )
    return [Entry("num_active_parameters", shape.num_active, why)]


def memory_entries(
    memory: MemoryEstimate, limit_gib: float | None, longest: LongestPair | None
) -> Iterator[Entry]:
    """What a GPU holds in training: every size, the peak, whether it fits, and what would."""
    yield from map(_entry, (*memory.resident, *memory.micro_batch, *memory.update))
    transients = memory.transients
    if memory.evaluation:
        evaluation = transients["evaluation"]
        yield Entry("evaluation_gib", evaluation / GIB, f"= {_sum(memory.evaluation)}")
    phase = max(transients, key=lambda name: transients[name])
    resident, added = in_gib(total(memory.resident)), in_gib(transients[phase])
    yield Entry("peak_gib", memory.peak_bytes / GIB, f"= {resident} resident + {added} {phase}")
    yield _fits_entry(memory.peak_bytes, limit_gib)
    if longest is not None:
        yield Entry("longest_pair_that_fits", longest.tokens, longest.arithmetic)


def host_entries(memory: MemoryEstimate) -> list[Entry]:
    """What a host holds: what is offloaded, and what checkpoints are written from."""
    return [_entry(size) for size in memory.host]


def reference_entries(
    config: RunConfig, passes: Mapping[str, Sequence[Size]], limit_gib: float | None
) -> list[Entry]:
    """Memory of a GPU in the reference pass; whether it fits is the last entry.

    `passes` has the sizes for each way that reference.sharding leaves open. The last one decides,
    since `auto` falls back to it.
    """
    if config.objective.reference_free:
        losses = ", ".join(config.objective.names)
        needed = Entry("needed", False, f"objective.loss {losses} has no reference")
        return [needed, Entry("fits", True)]
    return export_entries(passes, limit_gib)


def export_entries(passes: Mapping[str, Sequence[Size]], limit_gib: float | None) -> list[Entry]:
    """Memory of a GPU that evaluates and verifies the export; arguments as `reference_entries`."""
    entries = [
        Entry(f"{how}_gib", total(sizes) / GIB, f"= {_sum(sizes)}") for how, sizes in passes.items()
    ]
    return [*entries, _fits_entry(total(list(passes.values())[-1]), limit_gib)]


def batch_entries(config: RunConfig, setup: Setup, counts: PairCounts | None) -> Iterator[Entry]:
    """How the pairs of a step are spread over ranks and micro-batches."""
    pairs, tokens = config.train.global_batch_size, config.train.micro_batch_tokens
    yield Entry("global_batch_pairs", pairs, "train.global_batch_size")
    shared, places = setup.ranks_per_row, setup.world_size // setup.ranks_per_row
    ranks = f"{setup.world_size} ranks" if shared == 1 else f"{places} teams of {shared} ranks"
    yield Entry("pairs_per_rank", pairs / places, f"= {pairs} pairs / {ranks}")
    yield Entry("micro_batch_tokens", tokens, "train.micro_batch_tokens")
    if counts is None:
        yield Entry("micro_batches_per_step", None, NO_PAIRS)
        return
    yield Entry("mean_pair_tokens", counts.mean_tokens, "prompt + chosen + rejected")
    yield Entry("longest_pair_tokens", counts.longest_tokens)
    for order, computed in counts.computed.items():
        if min(counts.computed.values()) < 1:
            why = f"of these tokens with data.order {order}: what pairs of a step share, once"
            yield Entry(f"computed_by_{order}", computed, why)
    micro_batches, steps = sum(counts.micro_batches), len(counts.micro_batches)
    why = f"= {micro_batches} micro-batches of a rank / the first {steps} steps"
    yield Entry("micro_batches_per_step", micro_batches / steps, why)
    if shared > 1:
        yield _all_to_all_entry(config, setup, counts)


def _all_to_all_entry(config: RunConfig, setup: Setup, counts: PairCounts) -> Entry:
    """What a rank sends in a step to those that share its rows."""
    pairs, shared = config.train.global_batch_size, setup.ranks_per_row
    coupled = config.objective.second_forward is not None
    tokens = counts.mean_tokens * counts.computed[config.data.order] * pairs * shared
    tokens /= setup.world_size
    sent = setup.exchanged_bytes(tokens, 1 + coupled) / GIB
    if setup.padded:
        return Entry("all_to_all_gib", sent, "padded rows are shared by their sequences")
    each, passes = round(setup.exchanged_each), setup.passes + coupled
    why = f"sent in a step = {tokens / shared:,.0f} tokens x {each:,} bytes x {passes} passes"
    return Entry("all_to_all_gib", sent, why)


def _ranks_per_row(setup: Setup) -> list[Entry]:
    shared = setup.ranks_per_row
    return [Entry("ranks_per_row", shared, "train.sequence_parallel")] if shared > 1 else []


def work_entries(config: RunConfig, setup: Setup, counts: PairCounts | None) -> Iterator[Entry]:
    """Steps, tokens, and the FLOPs of training and of the reference pass."""
    flops = flops_per_token(setup.shape, checkpointing=setup.checkpointing, tiled_mlp=setup.tiled)
    forward, training = flops.forward, flops.hardware
    why = f"= 2 x {setup.shape.num_active:,} matrix elements"
    yield Entry("forward_gflop_per_token", forward / 1e9, why)
    passes = "forward and backward"
    if setup.checkpointing:
        passes += ", and the forward recomputed"
    if setup.tiled:
        again = 2 * setup.shape.num_layers * setup.shape.num_mlp
        passes += f", and {again / 1e9:.3g} of MLPs recomputed in tiles"
    coupled = config.objective.second_forward
    if coupled is not None:
        training += forward
        passes += f"; + {forward / 1e9:.3g} of a forward ahead of them, since {coupled}"
    yield Entry("training_gflop_per_token", training / 1e9, passes)
    if counts is None:
        for key in ("num_pairs", "num_steps", "num_tokens", "training_pflop", "reference_pflop"):
            yield Entry(key, None, NO_PAIRS)
        return
    yield from _step_entries(config, counts)
    tokens = _training_tokens(config, counts)
    why = f"= {training / 1e9:.3g} GFLOP x {tokens:,} tokens"
    yield Entry("training_pflop", tokens * training / 1e15, why)
    if config.objective.reference_free:
        yield Entry("reference_pflop", 0.0, "no reference pass")
        return
    scored = counts.reference_tokens
    why = f"= {forward / 1e9:.3g} GFLOP x {scored:,} tokens, every prompt and answer once"
    yield Entry("reference_pflop", scored * forward / 1e15, why)


def _step_entries(config: RunConfig, counts: PairCounts) -> Iterator[Entry]:
    settings, num_pairs = config.train, counts.num_pairs
    yield Entry("num_pairs", num_pairs, f"and {counts.num_held_out:,} held out")
    epochs = f"{num_pairs:,} pairs x {settings.num_epochs:g} epochs"
    capped = f", at most train.max_steps {settings.max_steps}" if settings.max_steps else ""
    why = f"= floor({epochs} / {settings.global_batch_size} pairs){capped}"
    yield Entry("num_steps", counts.num_steps, why)
    in_steps = counts.num_steps * settings.global_batch_size
    computed = counts.computed[config.data.order]
    shared = f" x {computed:.3f} computed" if computed < 1 else ""
    why = f"= {counts.mean_tokens:,.1f} tokens per pair x {in_steps:,} pairs{shared}"
    yield Entry("num_tokens", _training_tokens(config, counts), why)


def _training_tokens(config: RunConfig, counts: PairCounts) -> int:
    in_steps = counts.num_steps * config.train.global_batch_size
    return round(counts.mean_tokens * in_steps * counts.computed[config.data.order])


def disk_entries(
    sizes: Sequence[Size], *, pairs_known: bool, free_bytes: int, folder: Path
) -> list[Entry]:
    """What is written, as far as it is known, beside what is free; `fits` is the last entry."""
    unknown = () if pairs_known else ("pairs_gib", "reference_store_gib")
    needed, free = total(sizes) / GIB, free_bytes / GIB
    return [
        *(Entry(key, None, NO_PAIRS) for key in unknown),
        *map(_entry, sizes),
        Entry("total_gib", needed, "sum of what is known" if unknown else "sum of these"),
        Entry("free_gib", free, f"in {folder}"),
        Entry("fits", needed <= free),
    ]


def _entry(size: Size) -> Entry:
    return Entry(f"{size.name}_gib", size.num_bytes / GIB, f"= {size.arithmetic}")


def _sum(sizes: Sequence[Size]) -> str:
    """1.0 GiB parameters + 20.0 MiB activations."""
    terms = (f"{in_gib(size.num_bytes)} {spelled(size.name)}" for size in sizes)
    return " + ".join(terms)


def _fits_entry(num_bytes: int, limit_gib: float | None) -> Entry:
    if limit_gib is None:
        return Entry("fits", None, "without --gpu-memory-gib")
    needed = f"{in_gib(num_bytes)} + {in_gib(RESERVE_BYTES)} reserve"
    return Entry("fits", fits(num_bytes, limit_gib * GIB), f"{needed} of {limit_gib:.1f} GiB")
