"""One item ahead, in a thread that ends with the block."""

import threading
from collections.abc import Iterator

import pytest

from dpo_dist.data.ahead import one_ahead

WAIT_S = 20.0


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ahead")]


def test_the_next_item_is_made_while_one_is_in_use_and_no_further() -> None:
    begun = [threading.Event() for _ in range(4)]
    makers: set[str] = set()

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            makers.add(threading.current_thread().name)
            yield number

    with one_ahead(items()) as coming:
        for number, item in enumerate(coming):
            assert item == number
            assert all(event.wait(WAIT_S) for event in begun[: number + 2])
            assert not any(event.is_set() for event in begun[number + 2 :])
    assert number == 3 and len(makers) == 1 and "ahead" in makers.pop()
    assert not threads()


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise OSError("the third")

    seen: list[int] = []
    with pytest.raises(OSError, match="the third"), one_ahead(items()) as coming:
        for item in coming:
            seen.append(item)
    assert seen == [0, 1]
    assert not threads()


def test_the_thread_ends_with_a_block_that_is_left_early() -> None:
    with one_ahead(iter(range(9))) as coming:
        assert next(coming) == 0 and threads()
    assert not threads()
    with pytest.raises(KeyError), one_ahead(iter(range(9))) as coming:
        next(coming)
        raise KeyError
    assert not threads()
    with one_ahead(iter(range(9))):
        pass
    assert not threads()


def test_items_may_be_none_and_there_may_be_none() -> None:
    for items in ([None, None], []):
        with one_ahead(iter(items)) as coming:
            assert list(coming) == items
