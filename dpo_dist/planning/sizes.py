"""A number of bytes with the arithmetic behind it, and how numbers are written."""

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """Bytes of one thing, in memory or on disk, and how they were worked out."""

    name: str
    num_bytes: int
    arithmetic: str


def total(sizes: Iterable[Size]) -> int:
    """Bytes of all sizes together."""
    return sum(size.num_bytes for size in sizes)


def size_of_parameters(
    name: str, bytes_each: float, count: int, which: str = "", *, ranks: int = 1
) -> Size:
    """`count` parameters of `bytes_each`, divided among `ranks`; `which` says what they are.

    >>> size_of_parameters("gradients", 2, 8_030_261_248, "trained", ranks=8).arithmetic
    '2 bytes x 8.03 B trained parameters / 8 ranks'
    """
    what = f"{which} parameters".lstrip()
    arithmetic = f"{bytes_each:g} bytes x {shortened(count)} {what}"
    if ranks > 1:
        arithmetic += f" / {ranks} ranks"
    return Size(name, int(bytes_each * count) // ranks, arithmetic)


def shortened(number: int) -> str:
    """12,345 or 679 M or 8.03 B."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number:,}"
    return f"{number:,}"


def in_gib(num_bytes: float) -> str:
    """1.5 GiB, or 20.0 MiB below one."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.1f} MiB"
