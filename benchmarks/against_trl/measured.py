"""Clocks and counters of one process: memory, collectives, FLOPs, the speed of a matrix product."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.live_bytes import LiveBytes

MIB = 1 << 20
# Which argument is the whole tensor of a collective, the larger of what goes in and comes out.
WHOLE = {
    "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather_into_tensor": 0, "all_gather": 0,
    "reduce_scatter_tensor": 1, "reduce_scatter": 1, "all_to_all_single": 0,
}  # fmt: skip
OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "barrier")
PRODUCT = 2048  # rows and columns of the matrices whose product is timed


class Collectives:
    """Calls and bytes of the process group by name, counted where Python calls it."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        for name in (*WHOLE, *OF_OBJECTS):
            self._watch(name, WHOLE.get(name))

    def reset(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def taken(self) -> dict[str, tuple[int, int]]:
        """name -> (calls, bytes) since the last reset; of Python objects only the calls."""
        return {name: (count, self.bytes[name]) for name, count in self.calls.items()}

    def _watch(self, name: str, position: int | None) -> None:
        real: Callable[..., Any] = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if position is not None:
                whole = [*args, *kwargs.values()][position]
                parts = whole if isinstance(whole, list) else [whole]
                self.bytes[name] += sum(part.nbytes for part in parts)
            return real(*args, **kwargs)

        setattr(dist, name, watched)


class Counted:
    """FLOPs of matrix products and the most bytes alive, inside the block.

    torch does not count attention on CPUs, so neither system's is in the FLOPs.
    """

    def __init__(self) -> None:
        in_place = {torch.ops.aten.addmm_: lambda own, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
        self._flops = FlopCounterMode(display=False, custom_mapping=in_place)
        self._live = LiveBytes()

    def __enter__(self) -> Counted:
        self._flops.__enter__()
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)
        self._flops.__exit__(*error)

    @property
    def figures(self) -> dict[str, float]:
        tflop = self._flops.get_total_flops() / 1e12
        return {"tflop": tflop, "live_mib": self._live.peak / MIB}


def forget_peak() -> None:
    """The peak of this process's memory begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mib(peak: bool) -> float:
    """Resident memory of this process, now or at its peak."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def matrix_product() -> dict[str, float]:
    """TFLOP/s of a float32 product on this process's threads, the best of several."""
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return {"tflops": 2 * PRODUCT**3 / min(seconds) / 1e12, "threads": torch.get_num_threads()}
