"""Peak memory = resident memory + the largest of three transients, as plain arithmetic.

1. `memory_resident`: what DeepSpeed holds from the first step to the last.
2. `memory_transient`: what a micro-batch, an optimizer update or an evaluation adds to it.
3. `estimate_memory` adds them up; `reference_sizes` does the same for the reference pass.

No torch, no files, no machine: everything comes from a `Setup`. Every `Size` carries its own
arithmetic. A test compares them with the bytes that DeepSpeed and autograd really hold;
docs/planning.md says what they leave out.
"""

from dataclasses import dataclass, replace

from dpo_dist.planning.memory_resident import host_sizes, parameter_sizes, resident_sizes
from dpo_dist.planning.memory_transient import micro_batch_sizes, scoring_sizes, update_sizes
from dpo_dist.planning.setup import Setup, Sharding
from dpo_dist.planning.sizes import GIB, Size, in_gib, total

MOST_TOKENS = 2**30  # where the search for the longest pair ends
RESERVE_BYTES = 2 * GIB  # assumed: CUDA context, NCCL's buffers, fragmentation of the allocator


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one GPU, and of one host where something is kept there."""

    resident: tuple[Size, ...]
    micro_batch: tuple[Size, ...]
    update: tuple[Size, ...]
    evaluation: tuple[Size, ...]
    host: tuple[Size, ...]

    @property
    def transients(self) -> dict[str, int]:
        """Bytes that each phase adds, by what it is called."""
        return {
            "micro-batch": total(self.micro_batch),
            "optimizer update": total(self.update),
            "evaluation": total(self.evaluation),
        }

    @property
    def peak_bytes(self) -> int:
        """Resident memory, and the largest transient."""
        return total(self.resident) + max(self.transients.values())


def estimate_memory(setup: Setup) -> MemoryEstimate:
    """Memory of one GPU of a training run, and of one host with an offloaded optimizer."""
    return MemoryEstimate(
        resident=tuple(resident_sizes(setup)),
        micro_batch=tuple(micro_batch_sizes(setup)),
        update=tuple(update_sizes(setup)),
        evaluation=tuple(scoring_sizes(setup)) if setup.scoring_tokens else (),
        host=tuple(host_sizes(setup)),
    )


def reference_sizes(setup: Setup, sharding: Sharding) -> tuple[Size, ...]:
    """Memory of a GPU in the reference pass: the parameters and a forward without gradients."""
    scoring = replace(setup, sharding=sharding)
    return *parameter_sizes(scoring), *scoring_sizes(scoring)


@dataclass(frozen=True)
class LongestPair:
    """Tokens of the longest pair that fits, alone in its micro-batch, and how it was found."""

    tokens: int
    arithmetic: str


def longest_pair(setup: Setup, limit_bytes: int | float) -> LongestPair:
    """The longest pair that a GPU of `limit_bytes` trains on; 0 tokens when none fits."""

    def with_pair(tokens: int) -> MemoryEstimate:
        scoring = tokens if setup.scoring_tokens else 0
        return estimate_memory(replace(setup, micro_batch_tokens=tokens, scoring_tokens=scoring))

    def has_room(tokens: int) -> bool:
        return fits(with_pair(tokens).peak_bytes, limit_bytes)

    low, high = 0, 1
    while has_room(high) and high < MOST_TOKENS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if has_room(middle) else (low, middle)
    resident = total(with_pair(1).resident)
    room = f"{in_gib(limit_bytes)} - {in_gib(RESERVE_BYTES)} reserve - {in_gib(resident)} resident"
    if low == 0:
        return LongestPair(0, f"{room}, which leaves no room for a pair")
    memory = with_pair(low)
    phase = max(memory.transients, key=lambda name: memory.transients[name])
    shared = setup.ranks_per_row  # so many tokens more are one more on each of their ranks
    each = with_pair(low + shared).transients[phase] - memory.transients[phase]
    fixed = memory.transients[phase] - -(-low // shared) * each
    by_ranks = f"{shared} ranks x " if shared > 1 else ""
    text = f"tokens = {by_ranks}({room} - {in_gib(fixed)} of a {phase} of any length) / "
    text += f"{each:,} bytes"
    return LongestPair(low, text)


def fits(num_bytes: int, limit_bytes: int | float) -> bool:
    """Whether a GPU of `limit_bytes` has room for `num_bytes` and the reserve."""
    return num_bytes + RESERVE_BYTES <= limit_bytes
