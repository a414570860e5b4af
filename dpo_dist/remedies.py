"""What could make a run fit that does not: single changes of its config, each estimated again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dpo_dist.estimate import RESERVE_BYTES, ModelShape, Setup, Sharding, estimate

DOUBLINGS = 11  # of the ranks, at most


@dataclass(frozen=True)
class Remedy:
    """A change of the setup, and what it would come to."""

    change: str
    peak_bytes: int
    fits: bool


def remedies(
    setup: Setup,
    limit_bytes: int,
    shardings: Mapping[str, Sharding],
    with_adapter: ModelShape | None,
    longest_pair: int = 1024,
) -> list[Remedy]:
    """Single changes that lower the peak, those that fit first.

    `shardings` are alternatives by their name in train.deepspeed; `with_adapter` is the shape with
    LoRA, None when it is used already. A micro-batch is not cut below `longest_pair` tokens.
    """

    def tried(change: str, changed: Setup) -> Remedy:
        peak = estimate(changed).peak_bytes
        return Remedy(change, peak, peak + RESERVE_BYTES <= limit_bytes)

    def first_fit(chain: Iterator[Remedy]) -> list[Remedy]:
        """The first of ever stronger changes that fits, else the strongest."""
        last = None
        for remedy in chain:
            if (last := remedy).fits:
                break
        return [last] if last else []

    found: list[Remedy] = []
    if not setup.checkpointing:
        with_it = replace(setup, checkpointing=True)
        found.append(tried("train.gradient_checkpointing=true", with_it))
    halved = range(1, (setup.micro_batch_tokens // longest_pair).bit_length())
    sizes = [setup.micro_batch_tokens >> times for times in halved]
    found += first_fit(
        tried(
            f"train.micro_batch_tokens={size}",
            replace(setup, micro_batch_tokens=size, scoring_tokens=2 * size),
        )
        for size in sizes
    )
    for name, sharding in shardings.items():
        found.append(tried(f"train.deepspeed={name}", replace(setup, sharding=sharding)))
    ranks = [setup.world_size << times for times in range(1, 12)]
    found += first_fit(tried(f"{n} ranks", replace(setup, world_size=n)) for n in ranks)
    if with_adapter is not None:
        found.append(tried("adapter.rank=16 (LoRA)", replace(setup, shape=with_adapter)))
    now = estimate(setup).peak_bytes
    helpful = [remedy for remedy in found if remedy.peak_bytes < now]
    return sorted(helpful, key=lambda remedy: (not remedy.fits, remedy.peak_bytes))


