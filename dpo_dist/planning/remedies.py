"""What could make a run fit that does not: single changes of its config, each estimated again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dpo_dist.planning.memory import estimate_memory, fits
from dpo_dist.planning.setup import ModelShape, Setup, Sharding

DOUBLINGS = 10  # of the ranks, at most
TILES = (8192, 4096, 2048, 1024)  # tokens; smaller ones would leave a GPU idle

Change = tuple[str, Setup]


@dataclass(frozen=True)
class Remedy:
    """A change as the run config spells it, and the memory of a GPU that it leads to."""

    change: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Alternatives:
    """What a remedy may take in place of the run's own."""

    shardings: Mapping[str, Sharding]  # by their name in train.deepspeed
    with_adapter: ModelShape | None  # with LoRA; None when there is an adapter already
    quantized: ModelShape | None  # in NF4; None without an adapter that can train on it
    least_tokens: int  # of a micro-batch: the longest pair must fit


def find_remedies(setup: Setup, limit_bytes: int, others: Alternatives) -> list[Remedy]:
    """Single changes that lower the peak: those that fit first, then by the peak."""
    chains = [
        _checkpointed(setup),
        _tiled(setup),
        _offloaded(setup),
        (
            (f"{change} {more}", both)
            for change, tiled in _tiled(setup)
            for more, both in _offloaded(tiled)
        ),
        _shared_rows(setup),
        _smaller_micro_batches(setup, others.least_tokens),
        *(
            iter([(f"train.deepspeed={name}", replace(setup, sharding=sharding))])
            for name, sharding in others.shardings.items()
        ),
        _more_ranks(setup),
        _adapted(setup, others.with_adapter),
        _quantized(setup, others.quantized),
        _smaller_states(setup),
    ]
    found = [remedy for chain in chains for remedy in _first_that_fits(chain, limit_bytes)]
    now = estimate_memory(setup).peak_bytes
    return sorted(
        (remedy for remedy in found if remedy.peak_bytes < now),
        key=lambda remedy: (not remedy.fits, remedy.peak_bytes),
    )


def _first_that_fits(chain: Iterator[Change], limit_bytes: int) -> list[Remedy]:
    """The first of ever stronger changes that fits, else the strongest."""
    remedy = None
    for change, setup in chain:
        peak = estimate_memory(setup).peak_bytes
        remedy = Remedy(change, peak, fits(peak, limit_bytes))
        if remedy.fits:
            break
    return [remedy] if remedy else []


def _checkpointed(setup: Setup) -> Iterator[Change]:
    yield "train.gradient_checkpointing=true", replace(setup, checkpointing=True)


def _tiled(setup: Setup) -> Iterator[Change]:
    for tile in TILES:
        if setup.shape.num_mlp and tile < (setup.mlp_tile or setup.micro_batch_tokens):
            yield f"train.tiled_mlp={tile}", replace(setup, mlp_tile=tile)


def _offloaded(setup: Setup) -> Iterator[Change]:
    if setup.checkpointing and not setup.offload_activations:
        yield "train.offload_activations=true", replace(setup, offload_activations=True)


def _shared_rows(setup: Setup) -> Iterator[Change]:
    shared, heads = 2 * setup.ranks_per_row, setup.shape.num_heads
    while shared <= min(setup.world_size, heads) and not setup.padded:
        if setup.world_size % shared == heads % shared == 0:
            yield f"train.sequence_parallel={shared}", replace(setup, ranks_per_row=shared)
        shared *= 2


def _smaller_micro_batches(setup: Setup, least_tokens: int) -> Iterator[Change]:
    tokens = setup.micro_batch_tokens // 2
    while tokens >= max(least_tokens, 1):
        smaller = replace(setup, micro_batch_tokens=tokens)
        if setup.scoring_tokens == 2 * setup.micro_batch_tokens:  # its default follows
            smaller = replace(smaller, scoring_tokens=2 * tokens)
        yield f"train.micro_batch_tokens={tokens}", smaller
        tokens //= 2


def _more_ranks(setup: Setup) -> Iterator[Change]:
    for times in range(1, DOUBLINGS + 1):
        ranks = setup.world_size << times
        yield f"{ranks} ranks", replace(setup, world_size=ranks)


def _quantized(setup: Setup, quantized: ModelShape | None) -> Iterator[Change]:
    if quantized is not None:
        yield "model.quantization=nf4 (QLoRA)", replace(setup, shape=quantized)


def _smaller_states(setup: Setup) -> Iterator[Change]:
    if setup.optimizer == "adamw" and not setup.sharding.offload_optimizer:
        yield "train.optimizer=adamw_8bit", replace(setup, optimizer="adamw_8bit")


def _adapted(setup: Setup, with_adapter: ModelShape | None) -> Iterator[Change]:
    if with_adapter is not None:
        yield "adapter.rank=16 (LoRA)", replace(setup, shape=with_adapter)
