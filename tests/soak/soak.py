"""A training under a killer that a seed decides: processes, files, the disk and the network fail.

The run of `unbroken` is trained once more in a folder of its own, on a small tmpfs and in a network
namespace where this user may have them. At random times something is done to it:

    kill, stop      SIGKILL or SIGSTOP for one rank
    usr2, term      a scheduler's signals, to one rank
    flip, cut       a byte of a random file changes, or its end is gone, and the ranks are killed
    fill            the disk is full until the run has ended
    unplug          the ranks cannot reach each other for a while
    ranks           begun again with another number of them (`elastic`)

Then the same command is given again, as a launcher would. Nothing may hang, nothing may end without
a fault, and no exit may need more than the command once more.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.commands import as_command
from support.ranks import POLL_S, Ranks, started_ranks
from support.tiny_run import succeed_on

from dpo_dist.engine.checkpoints.commit import verify
from dpo_dist.errors import CheckpointError
from dpo_dist.run.local_ranks import GRACE_S
from dpo_dist.run.run_dir import RunDir

LEAVING_S = 45.0  # the watchdog's limit below, and the half minute that it promises
SETTINGS = (
    "checkpoint.every_steps=3", "checkpoint.keep=4", "eval.every_steps=50", "watchdog.silent=6",
    "train.micro_batch_tokens=128",
)  # fmt: skip
TMPFS_MIB = 48
STEPS_BETWEEN = 3  # at most, from one fault to the next: a fast machine must not outrun them
STEPS_A_FAULT = 2 * STEPS_BETWEEN  # with those that a fault itself lets pass


@dataclass
class Soak:
    """One run under attack, and what was done to it."""

    run_yaml: Path
    run: RunDir
    chance: random.Random
    settings: tuple[str, ...]
    elastic: bool
    small_disk: bool
    own_network: bool
    counts: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    num_ranks: int = 2

    @property
    def num_faults(self) -> int:
        return sum(self.counts.values())

    def attempt(self, most: int) -> bool:
        """Starts the training and lets faults happen to it, `most` in all; whether it finished."""
        if self.elastic:
            self._set_ranks()
        begun = time.monotonic()
        arguments = ("train", str(self.run_yaml), f"run.dir={self.run.root}", *self.settings)
        with started_ranks(self.num_ranks, as_command, *arguments) as ranks:
            while self.num_faults < most:
                if self._ended_within(ranks, self.chance.uniform(0.3, 6.0), STEPS_BETWEEN):
                    break
                fault = self.chance.choice(self._faults())
                name = fault.__name__.strip("_")
                self.log.append(f"{time.monotonic() - begun:.1f} s: {name}")
                self.counts[name] += 1
                if fault(ranks):
                    self._expect_end(ranks, name)
                    self._after(name)
                    return False
            results = ranks.wait(timeout_s=600, grace_s=LEAVING_S)
        codes = [result.exit_code for result in results]
        expected = self.log and self.log[-1].endswith("unplug")  # noticed a moment later
        assert codes == [0] * self.num_ranks or expected, (
            f"ended by itself with {codes} after {self.log[-3:]}\n{results[0].output[-3000:]}"
        )
        return codes == [0] * self.num_ranks

    def _set_ranks(self) -> None:
        number = self.chance.choice([1, 2, 3])
        if number != self.num_ranks:
            self.num_ranks = number
            self.counts["ranks"] += 1

    def _faults(self) -> list[Callable[[Ranks], bool]]:
        faults = [self.kill, self.stop, self.usr2, self.term, self.flip, self.cut]
        return faults + [self.fill] * self.small_disk + [self.unplug] * self.own_network

    def _ended_within(self, ranks: Ranks, seconds: float, steps: float = math.inf) -> bool:
        """Whether all ranks end in this time, or before so many steps more are done."""
        deadline, last = time.monotonic() + seconds, self._steps_done() + steps
        while time.monotonic() < deadline and self._steps_done() < last:
            if all(process.poll() is not None for process in ranks.processes):
                return True
            time.sleep(POLL_S)
        return False

    def _steps_done(self) -> int:
        path = self.run.metrics_path
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _expect_end(self, ranks: Ranks, fault: str) -> None:
        """As a launcher: once a rank has failed the others get GRACE_S, then they are killed."""
        deadline = time.monotonic() + LEAVING_S
        while time.monotonic() < deadline:
            states = [process.poll() for process in ranks.processes]
            if None not in states:
                return
            if any(states) and time.monotonic() + GRACE_S < deadline:
                deadline = time.monotonic() + GRACE_S
            time.sleep(POLL_S)
        assert any(process.returncode for process in ranks.processes), (
            f"{fault}: all ranks still run after {LEAVING_S:.0f} s; {self.log[-3:]}"
        )
        ranks.kill()

    def _after(self, fault: str) -> None:
        """What a launcher's next job would do before this stage."""
        if fault in ("flip", "cut"):
            succeed_on(1, "reference", self.run_yaml, f"run.dir={self.run.root}")

    # Faults; each says whether the attempt has to end by it.

    def _one(self, ranks: Ranks, number: int) -> bool:
        process = self.chance.choice(ranks.processes)
        if process.poll() is None:
            os.kill(process.pid, number)
        return True

    def kill(self, ranks: Ranks) -> bool:
        return self._one(ranks, signal.SIGKILL)

    def stop(self, ranks: Ranks) -> bool:
        """Once the ranks have met: before, a stopped one is found by the limit of `load` only."""
        done = self._steps_done()
        while (now := self._steps_done()) <= done:
            done = min(done, now)  # what comes after the checkpoint is taken back, then done again
            if self._ended_within(ranks, POLL_S):
                return True
        return self._one(ranks, signal.SIGSTOP)

    def usr2(self, ranks: Ranks) -> bool:
        return self._one(ranks, signal.SIGUSR2)

    def term(self, ranks: Ranks) -> bool:
        return self._one(ranks, signal.SIGTERM)

    def flip(self, ranks: Ranks) -> bool:
        return self._damage(ranks, flipped)

    def cut(self, ranks: Ranks) -> bool:
        return self._damage(ranks, lambda content, where: content[:where])

    def _damage(self, ranks: Ranks, change: Callable[[bytes, int], bytes]) -> bool:
        """Changes a file under the feet of its writers, who are killed."""
        ranks.kill()
        path = self.chance.choice(self._files())
        self.log.append(str(path.relative_to(self.run.root)))
        content = path.read_bytes()
        if content:
            path.write_bytes(change(content, self.chance.randrange(len(content))))
        return True

    def _files(self) -> list[Path]:
        """All but what nothing else can restore: the pairs, the lines of past metrics, and all
        whole checkpoints but one."""
        whole = [path for path in self.run.checkpoints_dir.glob("step-*") if is_whole(path)]
        kept = {self.run.pairs_dir, self.run.metrics_path}
        kept |= set(sorted(whole)[:1] if len(whole) > 1 else whole)
        return sorted(
            path
            for path in self.run.root.rglob("*")
            if path.is_file() and not kept & {path, *path.parents}
        )

    def fill(self, ranks: Ranks) -> bool:
        filler = self.run.root / "filler"
        free = shutil.disk_usage(self.run.root).free
        try:
            with suppress(OSError):  # the ranks took some of it meanwhile
                filler.write_bytes(bytes(max(0, free - self.chance.randrange(40_000))))
            self._ended_within(ranks, 12)
        finally:
            filler.unlink()
            ranks.kill()
        return True

    def unplug(self, ranks: Ranks) -> bool:
        seconds = self.chance.uniform(0.5, 10.0)
        subprocess.check_call(["ip", "link", "set", "lo", "down"])
        self._ended_within(ranks, seconds)
        subprocess.check_call(["ip", "link", "set", "lo", "up"])
        return False


def settings_of(steps: int) -> tuple[str, ...]:
    """Overrides of a training of so many steps; the tiny run's pairs make five an epoch."""
    return *SETTINGS, f"train.num_epochs={steps // 5}"


def flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 16]) + content[where + 1 :]


def is_whole(step_dir: Path) -> bool:
    try:
        return bool(verify(step_dir))
    except (CheckpointError, OSError):
        return False


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of TMPFS_MIB at a folder; whether this user may mount it."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(folder)]
    mounted = not subprocess.run(command, capture_output=True, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.check_call(["umount", "--lazy", str(folder)])


def run_soak(
    run_yaml: Path, start: Path, folder: Path, *, faults: int, seed: int, steps: int,
    elastic: bool = False, own_network: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Trains `steps` steps under `faults` faults from the pairs and reference in `start`.

    The run is copied to `folder` at the end. What was done, how often, and the seconds it took.
    """
    began = time.monotonic()
    disk = folder.with_name(f"{folder.name}-disk")
    with small_disk(disk) as limited:
        run = RunDir(disk / "out")
        shutil.copytree(start, run.root)
        settings = settings_of(steps)
        chance = random.Random(seed)
        soak = Soak(run_yaml, run, chance, settings, elastic, limited, own_network)
        while not soak.attempt(faults):
            seconds = time.monotonic() - began
            print(f"{seconds:.0f} s, {soak.num_faults} faults: {', '.join(soak.log[-2:])}")
        seconds = time.monotonic() - began
        shutil.copytree(run.root, folder)
    return {
        "faults": soak.num_faults,
        "kinds": dict(soak.counts),
        "seconds": seconds,
        "seconds_between": seconds / soak.num_faults,
    }
