"""What one process is told to measure, and what all systems do alike."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.against_trl.measured import Collectives, Counted, forget_peak, memory_mib
from benchmarks.against_trl.rows import PairIds, Text, token_ids

BETA, LEARNING_RATE, SEED = 0.1, 1e-6, 0


@dataclass(frozen=True)
class Job:
    """One system on the rows of a case.

    The last of its steps is timed. Those before warm up on short rows, unless they are `counted`:
    then they have the same rows.
    """

    system: str
    model: str  # folder
    rows: str  # folder, texts.json, and TRL's datasets
    pairs: int  # of an optimizer step
    ranks: int
    sharding: str
    adapter: bool
    micro: int  # pairs of TRL's micro-batch
    budget: int  # tokens of ours
    max_length: int
    steps: int
    counted: bool

    def texts(self) -> list[Text]:
        """The rows of all steps."""
        found = json.loads((Path(self.rows) / "texts.json").read_text())
        warm_up = found["rows" if self.counted else "warm_up"]
        return warm_up * (self.steps - 1) + found["rows"]

    @property
    def dataset(self) -> str:
        """Folder of the same rows for TRL."""
        return f"{self.rows}/{'counted' if self.counted else 'timed'}"

    def token_ids(self, tokenizer: Any) -> list[PairIds]:
        return token_ids(self.texts(), tokenizer, self.max_length)


@dataclass
class Clock:
    """Figures of one process; each step's replace those of the step before."""

    collectives: Collectives
    counter: Counted | None
    imported_mib: float = field(default_factory=lambda: memory_mib(peak=False))
    figures: dict[str, Any] = field(default_factory=lambda: {"losses": [], "tokens": []})
    started: float = 0.0
    reference_s: float = 0.0  # all of the reference pass, with what it loads

    def reference(self, timed_s: float, whole_s: float) -> None:
        self.reference_s = whole_s
        self.figures["reference_s"] = timed_s
        self.figures["reference_mib"] = memory_mib(peak=True) - self.imported_mib
        self.figures["reference_collectives"] = self.collectives.taken()

    def begin(self, step: int) -> None:
        if step == 0:
            age = time.time() - psutil.Process().create_time()
            self.figures["ready_s"] = age - self.reference_s
            forget_peak()
            if self.counter is not None:
                self.counter.__enter__()
        self.collectives.reset()
        self.started = time.perf_counter()

    def end(self, step: int) -> None:
        self.figures["step_s"] = time.perf_counter() - self.started
        if step == 0 and self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.figures |= self.counter.figures
        self.figures["collectives"] = self.collectives.taken()
        self.figures["mib"] = memory_mib(peak=True) - self.imported_mib


def new_clock(job: Job) -> Clock:
    return Clock(Collectives(), Counted() if job.counted else None)
