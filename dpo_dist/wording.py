"""Numbers and other people's messages, in words a reader can use."""

import math


def counted(number: int, things: str) -> str:
    """A number and what it counts: "3 ranks", "1 rank"; a process is one of some processes."""
    one = things[:-2] if things.endswith("sses") else things[:-1]
    return f"{number:,} {one if number == 1 else things}"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name when it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts `span` into at most `parts`."""
    least = span / parts
    if least <= 0 or not math.isfinite(least):
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
