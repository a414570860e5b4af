"""RESULTS.md and its pictures, from the results alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.against_trl.results.figures import Figures, difference, of_case
from benchmarks.against_trl.results.plots import write_pictures
from benchmarks.against_trl.results.targets import targets

NAMES = {"trl": "TRL", "ours": "dpo-dist", "alone": "pairs alone"}

NOT_MEASURED = "Not measured in this run."

HEAD = """# Against TRL and dpo-prefix-sharing

<!-- written by `make bench`; edit benchmarks/against_trl/results/page.py instead -->

{machine}

What is compared, in float32 on CPUs, on the same rows and token ids, with as many pairs a step:

* **TRL**: `DPOTrainer` with `precompute_ref_log_probs`, its own collator and loop, loss `sigmoid`,
  without gradient checkpointing; one rank without DeepSpeed, two ranks under the ZeRO settings that
  dpo-dist has.
* **dpo-dist**: reference pass and optimizer steps from the parts that its stages are made of.
* **pairs alone**: the same with the layout of dpo-prefix-sharing, prompt | chosen | rejected, each
  pair by itself. With two answers a prompt it is what dpo-dist does, so it is measured with more.

Every line is a process of its own, the systems in turn (A B, B A). The steps before the last one
warm up. A step takes what the slowest rank takes, from the end of one step to the end of the next.
With one rank and two answers dpo-dist gets a token budget for as many micro-batches as TRL makes;
else as many tokens a micro-batch as TRL's has at its longest. Memory is the most that is resident
while training, beyond the imports. FLOPs are the matrix products that torch counts
(`FlopCounterMode`), attention left out. Tokens are those computed, padding among them, for each
token that occurs once. A made-up row has a prompt of the given share of a sequence, and answers of
half to one and a half times their mean.
"""


def write_page(results: dict[str, Any], page: Path) -> None:
    """Writes the page, and its pictures into `plots` beside it."""
    pictures = write_pictures(results, page.parent / "plots")
    parts = [
        HEAD.format(machine=_machine(results)),
        "## Targets\n\n" + _table(
            ["", "target", "measured", ""], [target.cells for target in targets(results)]
        ),
        *(f"![{title}](plots/{name})" for title, name in pictures.items()),
        "## One rank\n\n" + _cases(results, whole=True),
        "## One rank, over shares and answers\n\n" + _cases(results, whole=False),
        "## Two ranks\n\n" + _two_ranks(results),
        "## The same numbers\n\n" + _equality(results),
        "## Packing\n\n" + _fullness(results["fullness"]),
        "## Export\n\n" + _exports(results["exports"]),
        "## Start\n\n" + _starts(results["start"]),
    ]  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    changed = " with changes that are not committed" if machine["changed"] else ""
    peaks = [peak["tflops"] for peak in results["peaks"]]
    return (
        f"Commit {machine['commit']}{changed}; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; {versions}. Model {results['model']}; measured in "
        f"{results['seconds'] / 60:.0f} minutes. A float32 product of 2,048 x 2,048 matrices, "
        f"timed before every case: {max(peaks):.3f} TFLOP/s at best, "
        f"{statistics.median(peaks):.3f} in the median; shares of the peak are of the best."
    )


def _cases(results: dict[str, Any], whole: bool) -> str:
    """Lines of one rank, of the whole model or of its first layers."""
    peak, lines = max(each["tflops"] for each in results["peaks"]), []
    for result in results["cases"]:
        case = result["case"]
        if case["ranks"] > 1 or (case["layers"] is None) != whole:
            continue
        figures = of_case(result)
        for system, own in figures.items():
            ratio = {
                name: own[name] / figures["trl"][name] for name in ("train", "reference", "mib")
            }
            lines.append([
                f"{result['name']} ({result['facts']['pairs']} pairs)" if system == "trl" else "",
                NAMES[system],
                _rate(own, "reference", ratio["reference"]),
                _rate(own, "train", ratio["train"]),
                f"{own['mib']:,.0f} ({ratio['mib']:.2f}x)",
                f"{own['live_mib']:,.0f}",
                f"{own['tflop']:.3g}",
                f"{100 * own['tflops'] / peak:.0f} %",
                f"{own['tokens_per_unique']:.2f}",
            ])  # fmt: skip
    head = ["rows", "", "reference, pairs/s", "training, pairs/s", "peak MiB", "live MiB of a step",
            "TFLOP a step", "of the peak", "tokens per unique one"]  # fmt: skip
    if not lines:
        return NOT_MEASURED
    layers = {case["case"]["layers"] for case in results["cases"]} - {None}
    said = "" if whole else f"The model's first {max(layers)} layers and its head. "
    return (
        f"{said}± is half of what lies between the slowest and the fastest round.\n\n"
        f"{_table(head, lines)}"
    )


def _rate(figures: Figures, name: str, ratio: float) -> str:
    spread = 50 * figures[f"{name}_spread"]
    return f"{figures[name]:.3g} ±{spread:.0f} % ({ratio:.2f}x)"


def _two_ranks(results: dict[str, Any]) -> str:
    lines = []
    for result in results["cases"]:
        if result["case"]["ranks"] == 1:
            continue
        figures = of_case(result)
        for system, own in figures.items():
            trl = figures["trl"]
            lines.append([
                result["name"] if system == "trl" else "",
                NAMES[system],
                f"{own['reference']:.3g} ({own['reference'] / trl['reference']:.2f}x)",
                f"{own['train']:.3g} ({own['train'] / trl['train']:.2f}x)",
                f"{own['mib']:,.0f}",
                f"{own['micro_batches']}",
                f"{own['calls']:,}",
                f"{own['mib_exchanged']:,.0f}",
            ])  # fmt: skip
    head = ["", "", "reference, pairs/s", "training, pairs/s", "peak MiB of a rank",
            "micro-batches", "collectives a step", "MiB a step"]  # fmt: skip
    said = (
        "One thread each. Collectives are calls into `torch.distributed` on rank 0, bytes those of "
        "whole tensors; one measurement each, times have no spread.\n\n"
    )
    return said + _table(head, lines)


def _equality(results: dict[str, Any]) -> str:
    lines = []
    for result in results["cases"]:
        figures = of_case(result)
        trl, ours = figures["trl"], figures["ours"]
        largest = max(abs(score) for pair in trl["logps"] for score in pair)
        first, second = (abs(trl["losses"][step] - ours["losses"][step]) for step in (0, -1))
        lines.append([
            result["name"], f"{trl['losses'][0]:.6f}", f"{first:.1e}", f"{trl['losses'][-1]:.6f}",
            f"{second:.1e}", f"{difference(trl, ours, 'logps'):.1e} of {largest:.0f}",
        ])  # fmt: skip
    head = ["rows", "loss of the first step", "difference", "of the last", "difference",
            "largest difference of a reference log-prob"]  # fmt: skip
    return _table(head, lines)


def _fullness(found: dict[str, Any]) -> str:
    lines = [
        [
            f"{line['ranks']}", f"{line['budget']:,}", f"{line['fill']:.3f}",
            f"{line['imbalance']:.3f}", f"{line['reference_fill']:.3f}",
        ]
        for line in found["lines"]
    ]  # fmt: skip
    pairs = f"{found['pairs']} pairs of {found['mean_tokens']:,.0f} tokens"
    said = f"Plans of {pairs}, 256 pairs a step.\n\n"
    head = ["ranks", "token budget", "training: tokens over budget", "fullest rank over mean, - 1",
            "reference pass: tokens over budget"]  # fmt: skip
    return said + _table(head, lines)


def _exports(found: dict[str, Any]) -> str:
    lines = [
        [
            name if side == "theirs" else "", name if side == "theirs" else "dpo-dist",
            f"{both[side]['mib']:,.0f}", f"{both[side]['written_mib']:,.0f}",
            f"{both[side]['seconds']:.1f}",
        ]
        for name, both in found.items()
        for side in ("theirs", "ours")
    ]  # fmt: skip
    said = (
        "`zero_to_fp32` writes float32, the others the types of the base model. Peak memory is "
        "beyond the imports.\n\n"
    )
    return said + _table(["against", "", "peak MiB", "MiB written", "seconds"], lines)


def _starts(seconds: dict[str, list[float]]) -> str:
    lines = [
        [NAMES[name], ", ".join(f"{value:.1f}" for value in values)]
        for name, values in seconds.items()
    ]
    said = "Seconds from a new interpreter to the first step, without the reference pass.\n\n"
    return said + _table(["", "seconds"], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return NOT_MEASURED
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
