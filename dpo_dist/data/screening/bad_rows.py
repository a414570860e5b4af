"""Rows that cannot be read: told ten at a time, or dropped up to a share of all rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import BAD_ROW
from dpo_dist.data.rows.row import RowError
from dpo_dist.errors import DataError
from dpo_dist.wording import counted

MOST_TOLD = 10  # at once, so that a user need not start as often as rows are bad


@dataclass(frozen=True)
class BadRow:
    """Where a row lies, what was found there and expected, and what to do."""

    origin: str
    found: str
    expected: str
    remedy: str

    @classmethod
    def of(cls, error: RowError, origin: str) -> "BadRow":
        """An error as it travels between processes."""
        return cls(origin, error.found, error.expected, error.remedy)

    @classmethod
    def parse(cls, text: str) -> "BadRow":
        """What `str` made."""
        return cls(*json.loads(text))

    def __str__(self) -> str:
        return json.dumps(astuple(self))

    @property
    def reason(self) -> str:
        """What was found, without where."""
        return self.found.removeprefix(self.origin).lstrip(": ")


def bad_rows(details: Mapping[str, Sequence[str]]) -> list[BadRow]:
    """Those among the details of a split's dropped rows, in row order."""
    return [BadRow.parse(text) for text in details.get(BAD_ROW, ())]


def by_reason(bad: Sequence[BadRow]) -> list[tuple[str, int, str]]:
    """(what was found, how often, where first), the commonest first."""
    places: dict[str, list[str]] = {}
    for row in bad:
        places.setdefault(row.reason, []).append(row.origin)
    found = [(reason, len(origins), origins[0]) for reason, origins in places.items()]
    return sorted(found, key=lambda item: -item[1])


def refuse_bad_rows(
    bad: Sequence[BadRow], num_rows: int, split: str, section: DataSection, *, at_end: bool
) -> None:
    """Raises DataError when rows cannot be read and data.on_bad_row or max_bad_rows forbids it.

    `num_rows` have been read. Nothing is said before the end unless there is enough to tell.
    """
    raises = section.on_bad_row == "raise"
    allowed = 0 if raises else section.max_bad_rows * num_rows
    enough = at_end or (raises and len(bad) >= MOST_TOLD)
    if len(bad) <= allowed or not enough:
        return
    told = bad[:MOST_TOLD]
    if raises:
        expected = "none, because data.on_bad_row is raise"
        other = "Or set data.on_bad_row=drop."
    else:
        expected = f"at most data.max_bad_rows = {section.max_bad_rows:.2%} of {num_rows:,} rows"
        share = math.ceil(len(bad) / num_rows * 1000) / 1000
        other = f"Or set data.max_bad_rows={share:g}."
    if raises and len(bad) == 1:
        raise DataError(bad[0].found, bad[0].expected, f"{bad[0].remedy} {other}")
    number = counted(len(bad), f"{split} rows")
    head = f"{number} cannot be read" if at_end else f"{number} so far cannot be read"
    remedies = " ".join(dict.fromkeys(row.remedy for row in told))
    raise DataError(
        "\n".join([f"{head}:", *(f"  {row.found}; expected {row.expected}" for row in told)]),
        expected,
        f"{remedies} {other}",
    )
