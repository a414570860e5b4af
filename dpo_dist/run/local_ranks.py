"""Runs stages on this machine: one process a rank, the same argv and environment as a cluster."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dpo_dist.config.cluster_section import LocalSection
from dpo_dist.run.attempts import TAIL_LINES, note_death
from dpo_dist.run.run_dir import rank_log_path
from dpo_dist.run.stop_flag import SIGNALS
from dpo_dist.run.topology import POLL_S, Topology

LOOPBACK = "127.0.0.1"
GRACE_S = 15.0  # for the other ranks to leave by themselves once one has failed
CPU_WORKERS = 2
PR_SET_PDEATHSIG = 1


def count_gpus() -> int:
    """GPUs of this machine that the processes may use, found without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def count_workers(local: LocalSection) -> tuple[int, str]:
    """Ranks of a distributed stage on this machine, and why."""
    if local.workers != "auto":
        return local.workers, "local.workers"
    gpus = count_gpus()
    if gpus:
        return gpus, f"{gpus} GPUs found"
    cores = os.cpu_count() or 1
    return min(CPU_WORKERS, cores), f"no GPU, {cores} cores"


def run_ranks(argv: Sequence[str], num_ranks: int, log_dir: Path) -> int:
    """Runs `argv` once a rank and waits; the exit code of the rank that tells why, or 0.

    Rank 0 has the terminal, the others write to their file in `log_dir`. When a rank fails the
    others get GRACE_S to leave, and are then killed; those that are stopped at once. Stop signals
    and SIGQUIT are passed on to every rank. The ranks die with this process, whatever kills it.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with contextlib.ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.enter_context(_killed_at_exit(ranks))
        for rank in range(num_ranks):
            output = None
            if rank:
                output = stack.enter_context(rank_log_path(log_dir, rank).open("ab"))
            topology = Topology(rank, num_ranks, rank, num_ranks, LOOPBACK, port)
            ranks.append(_start(argv, topology, output))
        stack.enter_context(_signals_forwarded(ranks))
        failed = _wait(ranks)
    if failed is None:
        return 0
    code = ranks[failed].returncode
    if code < 0:
        print(f"rank {failed} was {note_death(log_dir, failed, code)}", file=sys.stderr)
    if failed:
        _print_tail(rank_log_path(log_dir, failed), failed)
    return code if code >= 0 else 128 - code  # as a shell reports a death by signal


def _start(
    argv: Sequence[str], topology: Topology, output: BinaryIO | None
) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // topology.local_world_size)
    # More OpenMP threads than cores spin against each other, many times slower.
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | topology.environment()
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def die_with_parent() -> None:
    """For a child between fork and exec: the kernel kills it when its parent is gone."""
    with contextlib.suppress(OSError):  # Linux only; elsewhere _killed_at_exit has to do
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The rank that tells why, once all have ended; None when all ended well.

    It is chosen at the end: a rank that lost another is often gone before the one that failed.
    """
    failed, deadline = None, float("inf")
    while left := [process for process in ranks if process.poll() is None]:
        if deadline == float("inf") and _failed(ranks) is not None:
            deadline = time.monotonic() + GRACE_S
        lost = deadline < float("inf") and all(map(_is_stopped, left))
        if lost or time.monotonic() > deadline:
            failed = _failed(ranks) if failed is None else failed
            _kill(ranks)
        time.sleep(POLL_S)
    return _failed(ranks) if failed is None else failed


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a signal such as SIGSTOP holds a process: it cannot leave by itself."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """A rank that has failed, rather one that knows why: 1 is often the loss of another."""
    failed = [rank for rank, process in enumerate(ranks) if process.poll()]
    return min(failed, key=lambda rank: ranks[rank].returncode == 1, default=None)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _killed_at_exit(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        _kill(ranks)
        for process in ranks:
            process.wait()


@contextlib.contextmanager
def _signals_forwarded(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    passed_on = (*SIGNALS, signal.SIGQUIT)  # the last makes ranks write their stacks
    previous = {number: signal.signal(number, forward) for number in passed_on}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _print_tail(log_path: Path, rank: int) -> None:
    lines = log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    print(f"rank {rank} failed; the end of {log_path}:", *lines, sep="\n", file=sys.stderr)
