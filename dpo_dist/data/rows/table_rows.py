"""Rows of typed tables: Parquet, CSV, Arrow, and `datasets` folders.

All of them end up memory-mapped: Parquet and CSV are streamed once into an Arrow file in a
scratch folder, so that any process can read any row. Columns that no format reads are not decoded:
their names are there, the text of the first row, which may be a question, and of media whether
there are some.
"""

# pyright: basic
# (pyarrow and datasets have no types)

import csv
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_dist.data.rows.formats import MEDIA_COLUMNS
from dpo_dist.data.rows.row import Row, RowError, without_padding
from dpo_dist.errors import DataError
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.watch.heartbeat import beat
from dpo_dist.wording import first_line

SPOOL_ROWS = 1024  # rows held in memory while a file is streamed
_BUFFER_BYTES = 1 << 16
_CSV_FIELD_BYTES = 1 << 30  # Python's default of 128 KiB is less than a long answer


@dataclass(frozen=True)
class TableRows:
    """Rows of a memory-mapped `datasets.Dataset`; `lines` says where they lie in a text file.

    `media` are columns of it of which only matters whether a row has some, `unread` the names of
    other columns, with the first row's text.
    """

    dataset: Any
    label: str
    lines: npt.NDArray[np.int64] | None = None
    faults: Mapping[int, RowError] = field(default_factory=dict[int, RowError])  # by position
    media: Any = None
    unread: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    def __len__(self) -> int:
        return len(self.dataset)

    def first(self, limit: int | None) -> "TableRows":
        """The first `limit` rows."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, dataset=self.dataset.select(range(limit)))

    def reading(self, names: Collection[str]) -> "TableRows":
        """The same rows, of which only these columns are decoded."""
        schema = self.dataset.data.schema
        read, media, others = _sorted_columns(schema, names)
        select = self.dataset.with_format("arrow").select_columns
        texts = _texts(schema, others)
        return replace(
            self,
            dataset=self.dataset.select_columns(read),
            media=select(media) if media else None,
            unread=_first_texts(others, select(texts)[:1] if texts else None),
        )

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The rows at these positions."""
        order = list(map(int, positions))
        columns = dict(self.dataset[order])
        if self.media is not None:
            table = self.media[order]
            columns |= {name: _has_some(table[name]).to_pylist() for name in table.column_names}
        nothing = dict.fromkeys(self.unread)
        for index, position in enumerate(order):
            fields = {name: without_padding(values[index]) for name, values in columns.items()}
            fields |= nothing if position else self.unread
            fault = self.faults.get(position)
            yield Row({} if fault else fields, self.origin(position), fault=fault)

    def origin(self, position: int) -> str:
        """`file:line` in a CSV file, else `name:row` with rows counted from 1."""
        number = position + 1 if self.lines is None else self.lines[position]
        return f"{self.label}:{number}"


def open_parquet(
    path: Path, label: str, scratch_path: Path, limit: int | None, names: Collection[str]
) -> TableRows:
    """Streams these columns of the first `limit` rows of a Parquet file into a scratch file."""
    try:
        # with a buffer a column is read page by page
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            whole = file.schema_arrow
            read, media, others = _sorted_columns(whole, names)
            schema = pa.schema([*map(whole.field, read), *((n, pa.bool_()) for n in media)])
            leaves = [*read, *(_smallest_leaf(file.metadata, name) for name in media)]
            batches = (
                pa.record_batch(
                    [*(batch[n] for n in read), *(_has_some(batch[n]) for n in media)], schema
                )
                for batch in file.iter_batches(batch_size=SPOOL_ROWS, columns=leaves)
            )
            _spool(scratch_path, schema, _first_rows(batches, limit))
            texts = file.iter_batches(batch_size=1, columns=_texts(whole, others))
            unread = _first_texts(others, next(texts, None))
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{label} is not readable as Parquet ({first_line(error)})",
            "a Parquet file",
            "Write it again, or give the file its right suffix.",
        ) from None
    return TableRows(_from_file(scratch_path), label, unread=unread)


def open_csv(path: Path, label: str, scratch_path: Path, limit: int | None) -> TableRows:
    """Streams the first `limit` rows of a CSV file, all columns as text, into an Arrow file."""
    csv.field_size_limit(_CSV_FIELD_BYTES)
    lines: list[int] = []
    faults: dict[int, RowError] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            separator = "\t" if path.suffix == ".tsv" else ","
            reader = csv.reader(stream, strict=True, delimiter=separator)
            names = next(filter(None, reader), [])
            _check_header(names, label)
            schema = pa.schema([(name, pa.string()) for name in names])
            rows = itertools.islice(_csv_rows(reader, names, label, lines, faults), limit)
            batches = (
                pa.record_batch(dict(zip(names, zip(*group, strict=True), strict=True)), schema)
                for group in iter(lambda: list(itertools.islice(rows, SPOOL_ROWS)), [])
            )
            _spool(scratch_path, schema, batches)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label} is not UTF-8 (byte 0x{error.object[error.start]:02x} after line "
            f"{lines[-1] if lines else 1})",
            "UTF-8 text",
            "Convert it, for example with iconv.",
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{label} is not CSV after line {lines[-1] if lines else 1} ({error})",
            "comma-separated columns, fields with line breaks in double quotes",
            "Correct it.",
        ) from None
    return TableRows(_from_file(scratch_path), label, np.array(lines, dtype=np.int64), faults)


def open_arrow(path: Path, label: str) -> TableRows:
    """Maps an Arrow stream, the file that `datasets` writes."""
    try:
        return TableRows(_from_file(path), label)
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{label} is not readable as an Arrow stream ({first_line(error)})",
            "a file that `datasets` wrote",
            "Write it with save_to_disk, or as Parquet.",
        ) from None


def open_folder(path: Path, label: str, split: str) -> TableRows:
    """Opens a folder written by `save_to_disk`, of one data set or of splits."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{label} has the splits {', '.join(map(str, loaded))}, not {split!r}",
                "one of them",
                "Set the source's split.",
            )
        loaded = loaded[split]
    return TableRows(loaded, label)


def digest_of_table(rows: TableRows) -> str:
    """Identity of a data set's content: its Arrow files, and which rows of them are taken."""
    files = [digest_of_file(Path(file["filename"])) for file in rows.dataset.cache_files]
    return digest_of([files, rows.dataset._fingerprint if not files else len(rows)])


def _check_header(names: list[str], label: str) -> None:
    """Raises DataError at a header whose names are not distinct text, or that other signs than the
    suffix says divide."""
    if len(set(names)) != len(names):
        raise DataError(
            f"{label}:1 names a column twice ({', '.join(names)})",
            "a header of distinct names",
            "Rename one.",
        )
    if wrong := [name for name in names if "\0" in name]:
        raise DataError(
            f"{label}:1 names a column {wrong[0]!r}, with a zero byte",
            "a header of text",
            "Correct it, or convert the file if it is UTF-16.",
        )
    others = [sign for sign in ";\t|" if len(names) == 1 and sign in names[0]]
    if others:
        raise DataError(
            f"{label}:1 has one column, {names[0]!r}",
            "columns divided by commas, or by tabs in a .tsv",
            f"They look divided by {others[0]!r}: convert the file, or rename it to .tsv for tabs.",
        )


def _csv_rows(
    reader: Any, names: list[str], label: str, lines: list[int], faults: dict[int, RowError]
) -> Iterator[list[str]]:
    """The rows; the line each begins on is appended to `lines`, what is wrong goes to `faults`."""
    line = reader.line_num + 1
    for values in reader:
        if values:  # a blank line has no fields
            if len(values) != len(names):
                faults[len(lines)] = RowError(
                    f"{label}:{line} has {len(values)} fields",
                    f"{len(names)}, as in the header ({', '.join(names)})",
                    "Put fields with commas or line breaks in double quotes.",
                )
                values = [""] * len(names)
            lines.append(line)
            yield values
        line = reader.line_num + 1


def _sorted_columns(
    schema: pa.Schema, names: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """The columns that are read, at least one; those that hold media; and the others."""
    media = [name for name in schema.names if name in MEDIA_COLUMNS]
    rest = [name for name in schema.names if name not in MEDIA_COLUMNS]
    read = [name for name in rest if name in names] or rest[:1]
    return read, media, [name for name in rest if name not in read]


def _texts(schema: pa.Schema, names: list[str]) -> list[str]:
    kinds = (pa.string(), pa.large_string())
    return [name for name in names if schema.field(name).type in kinds]


def _first_texts(names: list[str], rows: Any) -> dict[str, str | None]:
    """The names, each with the text that it has in the first row."""
    first = rows.slice(0, 1).to_pylist() if rows is not None else []
    return dict.fromkeys(names) | (first[0] if first else {})


def _smallest_leaf(metadata: Any, name: str) -> str:
    """The part of a nested Parquet column that takes the least to read, such as an image's name."""
    leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    own = [n for n, path in enumerate(leaves) if path == name or path.startswith(f"{name}.")]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return leaves[min(own, key=lambda n: sum(g.column(n).total_compressed_size for g in groups))]


def _has_some(column: Any) -> Any:
    """Whether each row of a column holds something, without looking at what."""
    types, kind = pa.types, column.type
    if types.is_list(kind) or types.is_large_list(kind):
        lengths = pc.call_function("list_value_length", [column])
    elif any(is_kind(kind) for is_kind in (types.is_binary, types.is_string)):
        lengths = pc.call_function("binary_length", [column])
    else:
        return column.is_valid()
    return pc.call_function("greater", [lengths.fill_null(0), 0])


def _first_rows(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        if left <= 0:
            return
        yield batch.slice(0, left)
        left -= batch.num_rows


def _spool(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            beat()


def _from_file(path: Path) -> Any:
    import datasets

    return datasets.Dataset.from_file(str(path))
