"""Our forward against that of TRL's DPOTrainer: same rows, same ids, same weights, same process.

    python benchmarks/forward_vs_trl.py --model DIR --data ultrafeedback.jsonl --json figures.json

TRL tokenizes the rows and both take its ids, cut to --max-length from the start. Measured for each:

    forward             no gradient; TRL: `compute_ref_log_probs`, ours: `score_pairs`
    forward + backward  sigmoid loss and gradients of all weights; TRL: `compute_loss`

The reference's log-probs are given, so neither runs a second model. No gradient checkpointing.
Times alternate between the two, micro-batch by micro-batch, after one warm-up; a ratio is that of
the sums over micro-batches of each one's median over --repeats. FLOPs are counted over all rows,
peak bytes on the micro-batch with most tokens (on CUDA by its allocator).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from live_bytes import LiveBytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpo_dist.engine.forward.backend_choice import choose_backend
from dpo_dist.engine.forward.packing import PackedPairs, PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs

BETA = 0.1


@dataclass(frozen=True)
class System:
    """The two modes of one system as functions of a micro-batch; `forward` gives (B, 2)."""

    model: torch.nn.Module
    forward: Callable[[Any], Tensor]
    step: Callable[[Any], None]
    batches: list[Any]


def main() -> None:
    args = parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
        rows = list(trainer.train_dataset)
    # TRL patches the forward of its model, so ours is a model of its own.
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=trainer.model.dtype)
    groups = [rows[start : start + args.pairs] for start in range(0, len(rows), args.pairs)]
    theirs = trl_system(trainer, groups, device)
    ours, backend = our_system(model.to(device), groups, args.max_length)

    scores = [
        torch.cat([system.forward(batch) for batch in system.batches]) for system in (theirs, ours)
    ]
    result: dict[str, Any] = {
        "trl": trl.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "backend": backend,
        "rows": len(rows),
        "pairs_per_micro_batch": args.pairs,
        "max_length": args.max_length,
        "padded_tokens": sum(batch["input_ids"].numel() for batch in theirs.batches),
        "packed_tokens": sum(packed.num_tokens for packed, _ in ours.batches),
        "max_logp_difference": (scores[0] - scores[1]).abs().max().item(),
        "largest_logp": scores[0].abs().max().item(),
    }
    for mode, name in (("forward", "forward"), ("step", "forward_backward")):
        result[name] = compare(theirs, ours, mode, args.repeats)
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a causal LM")
    parser.add_argument("--data", required=True, type=Path, help="JSONL: prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def build_trainer(args: argparse.Namespace, folder: str) -> trl.DPOTrainer:
    """TRL's trainer over the first rows; it drops those whose prompt fills --max-length."""
    with args.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, args.rows)]
    # The dialogues hold the prompt as their shared first turns, which TRL splits off itself.
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    )
    config = trl.DPOConfig(
        output_dir=folder,
        max_length=args.max_length,
        per_device_train_batch_size=args.pairs,
        beta=BETA,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    return trl.DPOTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
    )


def trl_system(
    trainer: trl.DPOTrainer, groups: list[list[dict[str, Any]]], device: torch.device
) -> System:
    """TRL's own collator, forward and loss."""
    model = trainer.model.to(device)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        return torch.stack(trainer.compute_ref_log_probs(model, batch), 1)

    def step(batch: dict[str, Tensor]) -> None:
        model.zero_grad()
        trainer.compute_loss(model, dict(batch)).backward()

    batches = [
        {name: value.to(device) for name, value in trainer.data_collator(group).items()}
        for group in groups
    ]
    return System(model, forward, step, batches)


def our_system(
    model: torch.nn.Module, groups: list[list[dict[str, Any]]], max_length: int
) -> tuple[System, str]:
    """Our forward and the same loss; also the attention backend with the reason for it."""
    parameter = next(model.parameters())
    backend, reason = choose_backend(model, "auto", parameter.device, parameter.dtype)
    scorer = PairScorer(model, backend=backend)

    @torch.no_grad()
    def forward(batch: tuple[PackedPairs, Tensor]) -> Tensor:
        return score_pairs(scorer, batch[0])

    def step(batch: tuple[PackedPairs, Tensor]) -> None:
        scorer.zero_grad()
        packed, reference = batch
        ratios = score_pairs(scorer, packed) - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        loss.backward()

    batches = [
        (
            pack_pairs([cut(row, max_length) for row in group], parameter.device),
            torch.tensor(
                [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in group]
            ).to(parameter.device),
        )
        for group in groups
    ]
    return System(scorer, forward, step, batches), f"{backend} ({reason})"


def cut(row: dict[str, Any], max_length: int) -> PairIds:
    """The ids of a row with both sequences cut to `max_length`, as TRL's collator cuts them."""
    room = max_length - len(row["prompt_ids"])
    return row["prompt_ids"], row["chosen_ids"][:room], row["rejected_ids"][:room]


def compare(theirs: System, ours: System, mode: str, repeats: int) -> dict[str, Any]:
    """Both systems in one mode, and the ratios of theirs to ours."""
    call = {id(system): getattr(system, mode) for system in (theirs, ours)}
    seconds = {id(system): 0.0 for system in (theirs, ours)}
    call[id(theirs)](theirs.batches[0])
    call[id(ours)](ours.batches[0])
    for index in range(len(ours.batches)):
        times: dict[int, list[float]] = {id(theirs): [], id(ours): []}
        for repeat in range(repeats):
            order = (theirs, ours) if repeat % 2 else (ours, theirs)
            for system in order:
                times[id(system)].append(timed(call[id(system)], system.batches[index]))
        for system in (theirs, ours):
            seconds[id(system)] += statistics.median(times[id(system)])
    largest = max(range(len(ours.batches)), key=lambda index: ours.batches[index][0].num_tokens)
    measured = {}
    for name, system in (("trl", theirs), ("ours", ours)):
        measured[name] = {
            "seconds": seconds[id(system)],
            "tflop": count_flops(call[id(system)], system.batches) / 1e12,
            "peak_mib": peak_bytes(system, call[id(system)], system.batches[largest]) / 2**20,
        }
    ratios = {key: measured["trl"][key] / measured["ours"][key] for key in measured["ours"]}
    return {**measured, "ratio": ratios}


def timed(call: Callable[[Any], Any], batch: Any) -> float:
    synchronize()
    start = time.perf_counter()
    call(batch)
    synchronize()
    return time.perf_counter() - start


def count_flops(call: Callable[[Any], Any], batches: list[Any]) -> int:
    # which the counter does not know by itself
    in_place = {torch.ops.aten.addmm_: lambda own, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        for batch in batches:
            call(batch)
    return counter.get_total_flops()


def peak_bytes(system: System, call: Callable[[Any], Any], batch: Any) -> int:
    """Most bytes alive at once beside the weights."""
    system.model.zero_grad()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(batch)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        call(batch)
    return counter.peak


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(result: dict[str, Any]) -> None:
    print(
        f"{result['rows']} pairs, {result['padded_tokens']} padded and {result['packed_tokens']} "
        f"packed tokens, {result['dtype']} on {result['device']}, attention: {result['backend']}\n"
        f"largest log-prob difference {result['max_logp_difference']:.1e} "
        f"of {result['largest_logp']:.0f}"
    )
    for mode in ("forward", "forward_backward"):
        for key in ("seconds", "tflop", "peak_mib"):
            trl_, ours, ratio = (result[mode][name][key] for name in ("trl", "ours", "ratio"))
            print(f"{mode:17} {key:9} TRL {trl_:10.2f}  ours {ours:10.2f}  ratio {ratio:5.2f}")


if __name__ == "__main__":
    main()
