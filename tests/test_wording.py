"""What numbers look like in messages."""

import pytest

from dpo_dist.wording import counted


@pytest.mark.parametrize(
    ("number", "things", "said"),
    [(1, "ranks", "1 rank"), (2, "ranks", "2 ranks"), (1, "processes", "1 process"),
     (0, "pairs", "0 pairs"), (1200, "pairs", "1,200 pairs")],
)  # fmt: skip
def test_one_is_singular(number: int, things: str, said: str) -> None:
    assert counted(number, things) == said
