"""Rows of one answer and one label, as KTO takes them, paired by prompt.

The k-th good answer to a prompt is paired with its k-th bad one, so that no answer counts twice
and a prompt with many answers does not outweigh the others. An answer whose prompt has no further
answer of the other label stays without a partner.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_dist.config.data_section import PreferenceFormat
from dpo_dist.data.rows.formats import LABELLED_COLUMNS, detect_format, rename_columns
from dpo_dist.data.rows.joined_rows import JoinedRows
from dpo_dist.data.rows.json_rows import JsonRows
from dpo_dist.data.rows.messages import read_messages
from dpo_dist.data.rows.row import Row, RowError, type_name
from dpo_dist.data.rows.table_rows import TableRows
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import IntArray
from dpo_dist.run.manifest import digest_of

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_PROMPT_COLUMNS = ("prompt", "question", "system", "tools")
NONE = -1  # in place of the row of a partner
_READ_ROWS = 1024


@dataclass(frozen=True)
class LabelledRows:
    """Pairs of rows, in the order of their earlier row, as rows with `chosen` and `rejected`."""

    rows: JsonRows | TableRows | JoinedRows
    columns: dict[str, str]
    good: IntArray  # (N,) rows of the good answers, NONE where there is none
    bad: IntArray  # (N,)

    @property
    def label(self) -> str:
        """The file's name in origins."""
        return self.rows.label

    def __len__(self) -> int:
        return len(self.good)

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The pairs at these positions; a row without a partner says so, or has a fault."""
        order = list(map(int, positions))
        needed = [int(side[at]) for at in order for side in (self.good, self.bad)]
        numbers = sorted({number for number in needed if number != NONE})
        read = dict(zip(numbers, self.rows.read(numbers), strict=True))
        for at in order:
            good, bad = (read.get(int(side[at])) for side in (self.good, self.bad))
            alone = good or bad
            if good is None or bad is None:
                fault = None if alone is None else _fault_of(alone, self.columns)
                yield Row({}, self.origin(at), lacks_partner=True, fault=fault)
            else:
                good, bad = (_halved(rename_columns(row, self.columns)) for row in (good, bad))
                yield _joined(good, bad, self.origin(at))

    def origin(self, position: int) -> str:
        """`file:line+line` of the good and the bad answer, or `file:line` of a single one."""
        both = (int(self.good[position]), int(self.bad[position]))
        return joined_origin([self.rows.origin(number) for number in both if number != NONE])


def pair_labels(
    rows: JsonRows | TableRows | JoinedRows, columns: dict[str, str], where: str
) -> tuple[LabelledRows, PreferenceFormat]:
    """Pairs all rows of a source; also the format that its pairs have.

    One that cannot be read has no partner. Raises DataError when none can be read; `where` is the
    source's key.
    """
    waiting: dict[tuple[str, bool], deque[int]] = defaultdict(deque)
    starts: list[int] = []  # row of each pair's first answer
    partners: list[int] = []
    labels: list[bool] = []
    row_format: PreferenceFormat | None = None
    first_fault: RowError | None = None
    for position, row in enumerate(all_rows(rows)):
        if fault := _fault_of(row, columns):
            first_fault = first_fault or fault
            starts.append(position)
            labels.append(True)
            partners.append(NONE)
            continue
        row = _halved(rename_columns(row, columns))
        row_format = row_format or detect_format(_joined(row, row, row.origin), where)
        label, prompt = _label(row), _prompt_of(row)
        others = waiting[prompt, not label]
        if others:
            partners[others.popleft()] = position
            continue
        waiting[prompt, label].append(len(starts))
        starts.append(position)
        labels.append(label)
        partners.append(NONE)
    if row_format is None:
        assert first_fault is not None, "the source has rows"
        _refuse_columns(rows, columns, where)
        raise first_fault
    is_good = np.array(labels)
    first, second = np.array(starts, dtype=np.int64), np.array(partners, dtype=np.int64)
    good, bad = np.where(is_good, first, second), np.where(is_good, second, first)
    return LabelledRows(rows, columns, good, bad), row_format


def joined_origin(origins: Sequence[str]) -> str:
    """`file:line+line` of rows that were joined; of rows in two files, `file:line+file:line`."""
    first, *others = origins
    file = first.rpartition(":")[0] + ":"
    return "+".join([first, *(origin.removeprefix(file) for origin in others)])


def all_rows(rows: JsonRows | TableRows | JoinedRows) -> Iterator[Row]:
    """The rows of a source in order."""
    for start in range(0, len(rows), _READ_ROWS):
        yield from rows.read(range(start, min(start + _READ_ROWS, len(rows))))


def _halved(row: Row) -> Row:
    """A row that holds a whole dialogue, as prompt and completion."""
    if "completion" in row.fields or "messages" not in row.fields:
        return row
    *prompt, answer = read_messages(row, "messages")
    if not prompt or answer["role"] != "assistant":
        raise row.unusable("field 'messages' ends in no answer", "a question and an answer")
    fields = {name: value for name, value in row.fields.items() if name != "messages"}
    return Row({**fields, "prompt": prompt, "completion": [answer]}, row.origin)


def _refuse_columns(
    rows: JsonRows | TableRows | JoinedRows, columns: dict[str, str], where: str
) -> None:
    """Raises DataError when it is columns that a source of unusable rows lacks."""
    first = _halved(rename_columns(next(rows.read([0])).sound(), columns))
    if LABELLED_COLUMNS - first.fields.keys():
        raise DataError(
            f"{first.origin} has the columns {', '.join(first.fields) or '(none)'}",
            "prompt, completion and label, because the format is labelled",
            f"Map the file's names, for example {where}.columns={{completion: answer}}.",
        )


def _fault_of(row: Row, columns: dict[str, str]) -> RowError | None:
    """Why a row makes no half of a pair."""
    try:
        row = _halved(rename_columns(row.sound(), columns))
        row.field("completion")
        _label(row)
        _prompt_of(row)
    except RowError as fault:
        return fault
    return None


def _joined(good: Row, bad: Row, origin: str) -> Row:
    """One row of both answers; what else they hold, the prompt among it, is the good one's."""
    fields = {name: value for name, value in good.fields.items() if name not in LABELLED_COLUMNS}
    answers = {"chosen": good.field("completion"), "rejected": bad.field("completion")}
    return Row({**fields, **answers}, origin)


def _label(row: Row) -> bool:
    value: Any = row.field("label")
    found = _LABELS.get(str(value).strip().lower())
    if found is None:
        shown = f"{value!r}" if isinstance(value, str) else type_name(value)
        raise row.unusable(f"field 'label' is {shown}", "true or false")
    return found


def _prompt_of(row: Row) -> str:
    """Identity of a prompt."""
    prompt = {name: row.fields[name] for name in _PROMPT_COLUMNS if row.fields.get(name)}
    if not {"prompt", "question"} & prompt.keys():
        row.field("prompt")  # raises with the row's columns
        raise row.unusable("field 'prompt' is empty", "a prompt to find the partner by")
    return digest_of(prompt)
