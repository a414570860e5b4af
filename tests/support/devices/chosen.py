"""Cases that one process runs for all tests of a file: few by default, all with the slow ones."""

from collections.abc import Iterable
from typing import Any

import pytest


def few_of(names: Iterable[str], few: Iterable[str]) -> list[Any]:
    """Parameters for these names, of which all but a few are slow."""
    every, by_default = list(names), set(few)
    assert by_default <= set(every), by_default - set(every)
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in by_default else slow) for name in every]


def chosen_names(request: pytest.FixtureRequest) -> list[str]:
    """The values of `name` among the tests of this file that are run."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params["name"] for item in items if hasattr(item, "callspec")]
