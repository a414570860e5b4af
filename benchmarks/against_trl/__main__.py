"""dpo-dist against TRL's DPOTrainer and against the layout of dpo-prefix-sharing, on CPUs.

    python -m benchmarks.against_trl            # about 20 minutes on two cores, a 135M model
    python -m benchmarks.against_trl --quick    # a tiny model, a minute or two
    python -m benchmarks.against_trl --page     # the page again, from what was measured before

The model is DPO_DIST_REAL_MODEL, the real rows are in DPO_DIST_REAL_DATA. Every measurement is a
process of its own, the systems of a case in turn; build/bench/results.json keeps all of them, and
benchmarks/RESULTS.md is written from it. A quick run leaves that page alone and writes its own
beside its results. Each figure means what the page says of it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    args = parse_args()
    build = ROOT / "build" / ("bench-quick" if args.quick else "bench")
    page = build / "RESULTS.md" if args.quick or args.only else ROOT / "benchmarks" / "RESULTS.md"
    if not args.page:
        measure(build, args.quick, args.only)

    from benchmarks.against_trl.results.page import write_page

    write_page(json.loads((build / "results.json").read_text()), page)
    print(page.relative_to(ROOT))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case of each kind, tiny model")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names contain one")
    return parser.parse_args()


def measure(build: Path, quick: bool, only: list[str]) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before it is guessed in this process
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from benchmarks.against_trl import cases, driver, processes, tiny
    from benchmarks.against_trl.results import machine

    model, real = (os.environ.get(f"DPO_DIST_REAL_{name}") for name in ("MODEL", "DATA"))
    build.mkdir(parents=True, exist_ok=True)
    if quick:
        model, real = str(build / "tiny"), None
        processes.one(tiny.write_tiny_model, model)
    if model is None:
        raise SystemExit(
            "DPO_DIST_REAL_MODEL is not set; set it to a folder with SmolLM2-135M-Instruct "
            "(python examples/quickstart/fetch_model.py --out DIR), or pass --quick"
        )
    rows = None if real is None else Path(real)
    chosen = cases.named(cases.quick() if quick else cases.whole(rows is not None), only)
    results = {"machine": machine.described(), "model": Path(model).name, "quick": quick}
    results |= driver.measure(
        chosen, Path(model), rows, build / "work", num_starts=1 if quick else 2
    )
    (build / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
