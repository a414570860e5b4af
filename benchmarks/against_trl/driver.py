"""Measures every case: its systems one after the other, again and again, each in new processes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (the others import it late, each process anew)

from benchmarks.against_trl import exports, fullness, ours, processes, theirs
from benchmarks.against_trl.cases import Case
from benchmarks.against_trl.job import Job
from benchmarks.against_trl.measured import matrix_product
from benchmarks.against_trl.rows import longest, make_texts, shared_parts, token_ids, warm_up_texts
from benchmarks.against_trl.tiny import cut_layers

ROOT = Path(__file__).parents[2]
Result = dict[str, Any]


def measure(
    cases: list[Case], model: Path, real: Path | None, folder: Path, num_starts: int
) -> Result:
    """The results of all cases; `folder` is for what is written on the way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    peaks, results, began = [], [], time.monotonic()
    for number, case in enumerate(cases):
        peaks.append(processes.one(matrix_product))
        results.append(measure_case(case, model, real, folder / f"case{number}"))
        print(f"{time.monotonic() - began:6.0f} s  {case.name}", flush=True)
    found = processes.one(fullness.measure, str(model), None if real is None else str(real))
    exported = exports.measure(model, folder / "exports")
    print(f"{time.monotonic() - began:6.0f} s  exports", flush=True)
    started = starts(folder / "case0", num_starts)
    print(f"{time.monotonic() - began:6.0f} s  starts", flush=True)
    shutil.rmtree(folder)  # gigabytes of checkpoints
    return {
        "peaks": peaks, "cases": results, "fullness": found, "exports": exported, "start": started,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def measure_case(case: Case, model: Path, real: Path | None, folder: Path) -> Result:
    """name, settings and systems, each with a list of rounds of what its ranks returned."""
    folder.mkdir()
    job, facts = prepared(case, model, real, folder)
    rounds: dict[str, list[list[Result]]] = {system: [] for system in case.systems}
    for number in range(case.rounds):
        order = case.systems if number % 2 == 0 else case.systems[::-1]
        for system in order:
            # where it is counted, the timed step follows one on the same rows
            told = replace(job, system=system, counted=number == 0 and case.ranks == 1)
            forget_reference(folder)
            rounds[system].append(processes.run(case.ranks, work_of(system), told))
    return {"name": case.name, "case": asdict(case), "facts": facts, "systems": rounds}


def forget_reference(folder: Path) -> None:
    """Removes the log-probs that TRL would find beside its dataset instead of computing them."""
    for cached in folder.glob("*/cache-*"):
        cached.unlink()


def work_of(system: str) -> Callable[[Job], Result]:
    return theirs.measure if system == "trl" else ours.measure


def prepared(case: Case, model: Path, real: Path | None, folder: Path) -> tuple[Job, Result]:
    """A job without its system, and what its rows are like."""
    if case.layers is not None:
        cut = folder / "model"
        processes.one(cut_layers, str(model), case.layers, str(cut))
        model = cut
    facts = processes.one(
        write_rows, case, str(model), None if real is None else str(real), str(folder)
    )
    budget = facts["budget"] if case.same == "pairs" else 2 * case.micro * facts["longest"]
    job = Job(
        system="", model=str(model), rows=str(folder), pairs=case.rows.pairs, ranks=case.ranks,
        sharding=case.sharding, adapter=case.adapter, micro=case.micro, budget=budget,
        max_length=facts["longest"], steps=case.steps, counted=False,
    )  # fmt: skip
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    return job, facts | {"budget": budget}


def write_rows(case: Case, model: str, real: str | None, folder: str) -> Result:
    """Texts and TRL's datasets of them; what they have in tokens."""
    import numpy as np
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = make_texts(case.rows, tokenizer, None if real is None else Path(real))
    warm_up = warm_up_texts(len(texts), tokenizer)
    Path(folder, "texts.json").write_text(json.dumps({"rows": texts, "warm_up": warm_up}))
    for name, first in (("timed", warm_up), ("counted", texts)):
        Dataset.from_list(first * (case.steps - 1) + texts).save_to_disk(f"{folder}/{name}")
    pairs = token_ids(texts, tokenizer, case.rows.length if case.rows.share is None else 10**9)
    lengths = [sum(map(len, pair)) for pair in pairs]
    even = math.ceil(sum(lengths) / (len(pairs) // case.micro))
    sequences = [len(p) + len(a) for p, *both in pairs for a in both]
    return {
        "pairs": len(pairs),
        "longest": longest(pairs),
        "budget": max(*lengths, math.ceil(1.1 * even)),
        "unique_tokens": shared_parts(pairs).tokens(np.arange(len(pairs))),
        "prompt_share": sum(2 * len(p) for p, *_ in pairs) / sum(sequences),
    }


def starts(folder: Path, count: int) -> dict[str, list[float]]:
    """Seconds from a new interpreter to the first optimizer step, without the reference pass."""
    seconds: dict[str, list[float]] = {"trl": [], "ours": []}
    job = Job(**json.loads((folder / "job.json").read_text()))
    for _ in range(count):
        for system in seconds:
            told = json.dumps(asdict(replace(job, system=system)))
            command = [sys.executable, "-m", "benchmarks.against_trl.start", told]
            forget_reference(folder)
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"{system} did not start:\n{ended.stderr[-processes.LAST :]}")
            seconds[system].append(json.loads(ended.stdout.splitlines()[-1])["ready_s"])
    return seconds
