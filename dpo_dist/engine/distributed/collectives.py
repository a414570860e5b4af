"""The process group: starting and ending it, and the few exchanges that the stages need."""

import contextlib
import datetime
import io
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from dpo_dist.engine.distributed.devices import agree_on_device
from dpo_dist.errors import ClusterError, portable
from dpo_dist.run.topology import POLL_S, Topology
from dpo_dist.watch.watchdog import group_watched

Value = TypeVar("Value")
TIMEOUT = datetime.timedelta(minutes=30)
PIECE = 1 << 24  # elements that pass through a GPU at once
BUILD_S = 600.0  # longer than any of DeepSpeed's extensions takes to build


@contextlib.contextmanager
def process_group(topology: Topology) -> Iterator[torch.device]:
    """Joins the job's ranks (nccl on GPUs, gloo on CPUs) and leaves them in order at the end.

    What it sets in the environment is gone after it: a command that this process starts later is no
    rank. Raises ClusterError on every rank when their devices do not fit together.
    """
    with _environment_put_back():
        yield from _joined(topology)


@contextlib.contextmanager
def _environment_put_back() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _joined(topology: Topology) -> Iterator[torch.device]:
    os.environ.update(topology.environment())
    device, meeting = agree_on_device(topology, TIMEOUT)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # what DeepSpeed takes for the ordinal, also where every rank sees its own GPU only
        os.environ.update(replace(topology, local_rank=device.index).environment())
    else:
        # DeepSpeed would otherwise guess the accelerator, and its CPU one counts ranks by this.
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = str(topology.local_world_size)
    interface = _interface_to(topology.master_addr)
    if interface is not None:
        # Gloo would take the address that the host's own name leads to, often a loopback one.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # DeepSpeed builds a small extension with ninja, which pip puts beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import deepspeed

    remove_stale_build_locks()
    with contextlib.redirect_stdout(io.StringIO()):  # says that its extension was built
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=TIMEOUT,
        )
    del meeting
    _unlink_shared_memory(topology)
    where = topology.rank, topology.world_size, topology.master_addr
    with group_watched(*where, broadcast):
        yield device
    # Only after success: NCCL waits in here for all ranks. One that failed alone has to tell why
    # and leave; its launcher then ends the others.
    if dist.is_initialized():
        dist.destroy_process_group()


def own_address(address: str) -> str | None:
    """This machine's address on the network where `address` is, None when there is no way to it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing, only picks the route
        return probe.getsockname()[0]
    return None


def _interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches rank 0, None when none is found."""
    own = own_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    return None


def remove_stale_build_locks() -> None:
    """Removes the locks of extension builds that were killed: torch waits for them for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if time.time() - lock.stat().st_mtime > BUILD_S:
                lock.unlink()


def _unlink_shared_memory(topology: Topology) -> None:
    """Removes the name of DeepSpeed's CPU all-reduce buffer, 66 MiB of memory a rank.

    DeepSpeed never does, so every job would leave its buffers in memory until the next reboot. All
    ranks have mapped them by now, and a mapping outlives its name, also when a rank is killed.
    """
    dist.barrier()
    place = f"{topology.master_addr}_{topology.master_port}_{topology.rank}"
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{place}")
    buffer.unlink(missing_ok=True)


def broadcast(value: Value) -> Value:
    """What rank 0 passed, on every rank: whatever one rank decides alone goes through here."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory with what rank 0 has in it; the others pass one like it.

    Sent as it lies there, where `broadcast` makes three copies.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    for piece in tensor.view(-1).split(PIECE):
        sent = piece.to(device)
        dist.broadcast(sent, src=0)
        if sent is not piece:
            piece.copy_(sent)
    return tensor


def gather(value: Value) -> list[Value]:
    """The values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(vector: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks; float64 sums do not depend on the number of ranks in float32."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector)
    return vector


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest value of all ranks, on every rank."""
    vector = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector, dist.ReduceOp.MAX)
    return float(vector)


def time_all_reduce(mib: int, device: torch.device) -> float:
    """Seconds of one all-reduce of `mib` MiB, the faster of two: the first one connects."""
    vector = torch.zeros(mib * 2**18, dtype=torch.float32, device=device)
    times = []
    for _ in range(2):
        barrier()
        start = time.monotonic()
        sum_over_ranks(vector)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - start)
    return min(times)


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def on_first(work: Callable[[], Value]) -> Value:
    """What `work` returns on rank 0, on every rank; all ranks call together.

    Whatever one rank decides or does alone goes through here: its failure is raised on every rank
    instead of leaving the others in a collective.
    """
    error: Exception | None = None
    value: Any = None
    if is_first():
        try:
            value = work()
        except Exception as caught:
            error = caught
    told, value = broadcast((error and portable(error), value))
    if told is not None:
        raise error or told
    return value


def polled(work: Callable[[], Value], limit_s: float, what: str) -> list[Value]:
    """What `work` returns on each rank, in rank order, on every rank; all ranks call together.

    For work on files, which may take longer than the group waits for one exchange: the ranks ask
    each other all the time who is done. Raises ClusterError on every rank, naming those that are
    not after `limit_s` seconds, and what `work` raises on one rank.
    """
    results: list[tuple[Exception | None, Any]] = []

    def run() -> None:
        try:
            results.append((None, work()))
        except Exception as error:
            results.append((error, None))

    # a daemon: a file system that hangs must not keep the process from ending
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    deadline = time.monotonic() + limit_s
    while not all(finished := gather(not worker.is_alive())):
        if broadcast(time.monotonic() > deadline):
            late = [rank for rank, is_done in enumerate(finished) if not is_done]
            raise ClusterError(
                f"rank {late[0]} did not {what} within {limit_s:,.0f} s ({len(late)} ranks)",
                "a file system that answers",
                "Look at that node and its file system, then start the same command again.",
            )
        worker.join(POLL_S)
    reports = gather(results[0])
    if error := next((error for error, _ in reports if error is not None), None):
        raise error
    return [value for _, value in reports]


def place() -> tuple[int, int]:
    """(rank, world size)"""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is rank 0, which does what only one rank should do."""
    return not dist.is_initialized() or dist.get_rank() == 0
