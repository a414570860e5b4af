"""What the host makes while the device computes: one thread, one item ahead."""

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def one_ahead(items: Iterator[Item]) -> Generator[Iterator[Item]]:
    """The same items, each made in a thread while the one before it is in use.

    What making an item raises is raised where that item is asked for. The thread is gone when the
    block is left, however that is; it may finish the item that it is at.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def in_turn() -> Iterator[Item]:
            coming = thread.submit(_next, items)
            while made := coming.result():
                coming = thread.submit(_next, items)
                yield made[0]

        yield in_turn()


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    """The next item, None at the end: a future cannot hold a StopIteration."""
    for item in items:
        return (item,)
    return None
