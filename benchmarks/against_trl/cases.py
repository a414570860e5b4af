"""What is measured: the cases of the whole benchmark and of the quick one.

A case is measured for each of its systems:

    trl       DPOTrainer, with precompute_ref_log_probs
    ours      this project: prompts and answers shared
    alone     the layout of dpo-prefix-sharing, prompt | chosen | rejected for each pair; left out
              where no two pairs have a prompt in common, since it is then ours

`micro` pairs make a micro-batch of TRL. Ours gets a token budget instead: with `same` "pairs" what
so many pairs need, so that both make equally many micro-batches (memory is compared there), with
"tokens" what TRL's micro-batch has at its longest (collectives are compared there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

System = Literal["trl", "ours", "alone"]
SHARES = (10, 30, 50, 75, 90)  # percent of a sequence that is prompt
SWEEP_LAYERS = 4
ULTRAFEEDBACK = "ultrafeedback"


@dataclass(frozen=True)
class Rows:
    """All pairs of the answers to each prompt; with a share they are made up, else real."""

    prompts: int
    answers: int = 2
    share: int | None = None  # percent
    length: int = 384  # tokens of a made-up sequence, on average; of a real one at most

    @property
    def pairs(self) -> int:
        return self.prompts * self.answers * (self.answers - 1) // 2


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    name: str
    rows: Rows
    layers: int | None = None  # of the model that are kept; None: all
    ranks: int = 1
    sharding: Literal["plain", "zero2", "zero3"] = "plain"
    adapter: bool = False
    micro: int = 1
    same: Literal["pairs", "tokens"] = "pairs"
    rounds: int = 2
    systems: tuple[System, ...] = ("trl", "ours")

    @property
    def steps(self) -> int:
        """With the one that is timed; ZeRO-3 has settled what to gather after two."""
        return 2 if self.ranks == 1 else 3


def whole(has_real_rows: bool) -> list[Case]:
    """About 20 minutes on two cores with a model of 135M parameters."""
    several: tuple[System, ...] = ("trl", "ours", "alone")
    cases = [
        Case("75 % prompt", Rows(8, share=75, length=320)),
        Case(
            "4 answers", Rows(2, 4, share=60, length=256), micro=2, same="tokens", systems=several
        ),
    ]
    if has_real_rows:
        cases.insert(0, Case(ULTRAFEEDBACK, Rows(8, length=768)))
    return cases + sweep() + two_ranks(has_real_rows)


def sweep() -> list[Case]:
    """Over prompt shares with two answers, and over numbers of answers at half a share."""
    cases = [
        Case(f"share {share} %", Rows(8, share=share, length=256), SWEEP_LAYERS, rounds=1)
        for share in SHARES
    ]
    for answers, prompts in ((4, 2), (8, 1)):
        rows = Rows(prompts, answers, share=50, length=160)
        systems: tuple[System, ...] = ("trl", "ours", "alone")
        cases.append(
            Case(f"{answers} answers, share 50 %", rows, SWEEP_LAYERS, micro=2, same="tokens",
                 rounds=1, systems=systems)
        )  # fmt: skip
    return cases


def two_ranks(has_real_rows: bool) -> list[Case]:
    rows = Rows(8, length=320) if has_real_rows else Rows(8, share=30, length=256)
    return [
        Case(f"2 ranks, {sharding}, {'LoRA' if adapter else 'full'}", rows, ranks=2,
             sharding=sharding, adapter=adapter, micro=2, same="tokens", rounds=1)
        for sharding in ("zero2", "zero3")
        for adapter in (False, True)
    ]  # fmt: skip


def quick() -> list[Case]:
    """One of each kind, for a tiny model."""
    rows = Rows(4, share=50, length=48)
    answers = Rows(2, 4, share=50, length=48)
    two = Case("2 ranks, zero2, full", rows, ranks=2, sharding="zero2", same="tokens", rounds=1)
    return [
        Case("share 50 %", rows),
        Case("4 answers", answers, micro=2, same="tokens", rounds=1,
             systems=("trl", "ours", "alone")),
        two,
        replace(two, name="2 ranks, zero3, LoRA", sharding="zero3", adapter=True),
    ]  # fmt: skip


def named(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Those whose names contain one of the given ones; all without any."""
    return [case for case in cases if not names or any(name in case.name for name in names)]
