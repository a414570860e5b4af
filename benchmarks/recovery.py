"""From the kill of a rank to the next optimizer step, in parts, against a plain start.

    python benchmarks/recovery.py --config run.yaml --ranks 2 --after-step 6 --repeats 3

The run has its pairs and reference. `dpo-dist train` is started on a copy of its folder; once step
--after-step is logged, a rank is killed, and the launcher starts all again by itself. All times are
those of the files' and the logs' own clocks.

    noticed       kill -> the launcher starts the next attempt
    imported      -> the first line of a rank: libraries, process group, base model
    prepared      -> checkpoint verified and loaded, as the log tells
    first step    -> its line
"""

import argparse
import datetime
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_dist.config.run_config import load_config
from dpo_dist.run.run_dir import RunDir

LINE = re.compile(r"^(\S+ \S+),(\d+) rank 0 (.*)$", re.MULTILINE)
PARTS = ("noticed", "imported", "prepared", "first step", "in all", "plain start")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--after-step", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    rounds = [one_round(args) for _ in range(args.repeats)]
    for name in PARTS:
        times = [each[name] for each in rounds]
        print(
            f"{name:12} {statistics.median(times):6.2f} s   {' '.join(f'{t:.2f}' for t in times)}"
        )
    ratio = statistics.median(each["in all"] / each["plain start"] for each in rounds)
    print(f"in all / plain start {ratio:.2f}")


def one_round(args: argparse.Namespace) -> dict[str, float]:
    prepared = load_config(args.config, args.overrides).run.dir
    with tempfile.TemporaryDirectory(dir=prepared.parent) as folder:
        run = RunDir(Path(folder) / "out")
        for name in ("pairs", "reference"):
            shutil.copytree(prepared / name, run.root / name)
        overrides = [*args.overrides, f"run.dir={run.root}", f"local.workers={args.ranks}"]
        command = [sys.executable, "-m", "dpo_dist", "train", str(args.config), *overrides]
        started = time.time()
        launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            first, again = (run.log_dir("train", n) / "rank0000.log" for n in (1, 2))
            begun = at_step(first, 1)
            at_step(first, args.after_step)
            (victim,) = children(launcher.pid)[-1:]
            killed = time.time()
            os.kill(victim, signal.SIGKILL)
            wait_for(again.parent.exists)
            restarted = time.time()
            step = at_step(again, None)
            lines = times_of(again)
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        goes_on = next(when for when, text in lines if text.startswith("goes on after"))
    return dict(
        zip(
            PARTS,
            (restarted - killed, lines[0][0] - restarted, goes_on - lines[0][0], step - goes_on,
             step - killed, begun - started),
            strict=True,
        )
    )  # fmt: skip


def at_step(log: Path, step: int | None) -> float:
    """When the line of a step was written, of any for None."""
    wanted = re.compile(rf"step {step if step is not None else '[0-9]+'}/\d+ train")
    found: list[float] = []

    def is_there() -> bool:
        found[:] = [when for when, text in times_of(log) if wanted.match(text)]
        return bool(found)

    wait_for(is_there)
    return found[0]


def times_of(log: Path) -> list[tuple[float, str]]:
    text = log.read_text() if log.exists() else ""
    return [
        (datetime.datetime.fromisoformat(f"{second}.{milli}").timestamp(), said)
        for second, milli, said in LINE.findall(text)
    ]


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: object, limit_s: float = 300) -> None:
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s"
        time.sleep(0.02)


if __name__ == "__main__":
    main()
