"""Rows of one answer and its score, as HelpSteer has them, joined by prompt.

All rows of a prompt become one with the columns `responses` and `scores`. They are found by reading
the whole source once, which a stream does not allow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_dist.config.data_section import PreferenceFormat
from dpo_dist.data.rows.formats import ANSWER_COLUMNS, SCORE_COLUMNS, rename_columns
from dpo_dist.data.rows.joined_rows import JoinedRows
from dpo_dist.data.rows.json_rows import JsonRows
from dpo_dist.data.rows.row import Row, RowError
from dpo_dist.data.rows.stream_rows import StreamRows
from dpo_dist.data.rows.table_rows import TableRows
from dpo_dist.data.sources.labelled_rows import LabelledRows, all_rows, joined_origin, pair_labels
from dpo_dist.data.sources.ranked_rows import read_answer, read_prompt
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import IntArray
from dpo_dist.run.manifest import digest_of


@dataclass(frozen=True)
class ScoredRows:
    """Prompts with all their answers, in the order of the first answer to each.

    R rows of the file make G prompts; a row that cannot be read is a prompt of its own.
    """

    rows: JsonRows | TableRows | JoinedRows
    columns: dict[str, str]
    members: IntArray  # (R,) rows, those of a prompt together
    starts: IntArray  # (G + 1,) where the rows of each prompt begin in `members`

    @property
    def label(self) -> str:
        """The file's name in origins."""
        return self.rows.label

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The prompts at these positions as rows of several answers."""
        order = list(map(int, positions))
        needed = sorted({number for position in order for number in self._rows_of(position)})
        read = dict(zip(needed, self.rows.read(needed), strict=True))
        for position in order:
            yield self._joined([read[number] for number in self._rows_of(position)], position)

    def origin(self, position: int) -> str:
        """`file:line+line`, the lines of all answers to a prompt."""
        return joined_origin([self.rows.origin(number) for number in self._rows_of(position)])

    def _rows_of(self, position: int) -> list[int]:
        return self.members[self.starts[position] : self.starts[position + 1]].tolist()

    def _joined(self, rows: list[Row], position: int) -> Row:
        """One row of all answers; what else they hold, the prompt among it, is the first one's."""
        origin = self.origin(position)
        try:
            named = [rename_columns(row.sound(), self.columns) for row in rows]
            answers = [row.field(_answer_name(row)) for row in named]
            scores = [_score_of(row) for row in named]
        except RowError as fault:
            return Row({}, origin, fault=fault)
        own = (*ANSWER_COLUMNS, *SCORE_COLUMNS)
        fields = {name: value for name, value in named[0].fields.items() if name not in own}
        return Row({**fields, "responses": answers, "scores": scores}, origin)


def joined_by_prompt(
    rows: JsonRows | TableRows | JoinedRows | StreamRows,
    row_format: PreferenceFormat,
    columns: dict[str, str],
    key: str,
) -> tuple[LabelledRows | ScoredRows, PreferenceFormat]:
    """Rows of one answer each as rows of several, and their format; `key` is the source's."""
    if isinstance(rows, StreamRows):
        raise DataError(
            f"{key}.streaming is true, but {rows.label} has one answer and its score in each row",
            "all answers to a prompt in one row, since a stream is read once and they may be "
            "anywhere in it",
            f"Set {key}.streaming=false, or join the rows by prompt beforehand.",
        )
    if row_format == "labelled":
        return pair_labels(rows, columns, key)
    return _join_scores(rows, columns), "ranked"


def _join_scores(rows: JsonRows | TableRows | JoinedRows, columns: dict[str, str]) -> ScoredRows:
    """Finds the rows of each prompt; memory: a digest for each prompt and a number for each row."""
    numbers: dict[str, int] = {}
    prompts = np.empty(len(rows), dtype=np.int64)
    for position, row in enumerate(all_rows(rows)):
        prompts[position] = numbers.setdefault(_prompt_of(row, columns), len(numbers))
    starts = np.concatenate([[0], np.cumsum(np.bincount(prompts))])
    return ScoredRows(rows, columns, np.argsort(prompts, kind="stable"), starts)


def _prompt_of(row: Row, columns: dict[str, str]) -> str:
    """Identity of a prompt; of a row that cannot be read, one that no other has."""
    try:
        row = rename_columns(row.sound(), columns)
        name = _answer_name(row)
        read_answer(row, name, row.field(name))
        _score_of(row)
        beside: dict[str, Any] = {n: row.fields.get(n) or None for n in ("system", "tools")}
        return digest_of([read_prompt(row), beside])
    except RowError:
        return row.origin


def _answer_name(row: Row) -> str:
    return next((name for name in ANSWER_COLUMNS if name in row.fields), ANSWER_COLUMNS[0])


def _score_of(row: Row) -> float:
    name = next((name for name in SCORE_COLUMNS if name in row.fields), SCORE_COLUMNS[0])
    return row.checked_number(f"field {name!r}", row.field(name))
