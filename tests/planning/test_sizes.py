"""How the planner writes numbers of bytes and their arithmetic."""

import pytest

from dpo_dist.planning.sizes import GIB, Size, in_gib, shortened, size_of_parameters, total


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12_345, "12,345"),
        (999_999, "999,999"),
        (678_900_000, "679 M"),
        (8_030_261_248, "8.03 B"),
        (1_200_000_000_000, "1,200,000,000,000"),
    ],
)
def test_large_numbers_are_shortened(number: int, text: str) -> None:
    assert shortened(number) == text


def test_bytes_are_shown_in_gib_or_mib() -> None:
    assert in_gib(1.5 * GIB) == "1.5 GiB"
    assert in_gib(20 * 2**20) == "20.0 MiB"
    assert in_gib(1234 * GIB) == "1,234.0 GiB"


def test_parameters_are_divided_among_ranks() -> None:
    whole = size_of_parameters("parameters", 2, 1000)
    assert whole == Size("parameters", 2000, "2 bytes x 1,000 parameters")
    shared = size_of_parameters("optimizer", 12, 1000, "trained", ranks=8)
    assert shared == Size("optimizer", 1500, "12 bytes x 1,000 trained parameters / 8 ranks")
    assert total([whole, shared]) == 3500
