"""Rows of typed tables: Parquet, CSV, `datasets` folders and hub data sets.

All of them end up memory-mapped: Parquet and CSV are streamed once into an Arrow file in a
scratch folder, so that any process can read any row.
"""

# pyright: basic
# (pyarrow and datasets have no types)

import csv
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_dist.data.rows.row import Row, RowError, without_padding
from dpo_dist.errors import DataError
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.watch.heartbeat import beat, during
from dpo_dist.wording import first_line

SPOOL_ROWS = 1024  # rows held in memory while a file is streamed
_CSV_FIELD_BYTES = 1 << 30  # Python's default of 128 KiB is less than a long answer


@dataclass(frozen=True)
class TableRows:
    """Rows of a memory-mapped `datasets.Dataset`; `lines` says where they lie in a text file."""

    dataset: Any
    label: str
    lines: npt.NDArray[np.int64] | None = None
    faults: Mapping[int, RowError] = field(default_factory=dict[int, RowError])  # by position

    def __len__(self) -> int:
        return len(self.dataset)

    def first(self, limit: int | None) -> "TableRows":
        """The first `limit` rows."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, dataset=self.dataset.select(range(limit)))

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The rows at these positions."""
        order = list(map(int, positions))
        columns = self.dataset[order]
        for index, position in enumerate(order):
            fields = {name: without_padding(values[index]) for name, values in columns.items()}
            fault = self.faults.get(position)
            yield Row({} if fault else fields, self.origin(position), fault=fault)

    def origin(self, position: int) -> str:
        """`file:line` in a CSV file, else `name:row` with rows counted from 1."""
        number = position + 1 if self.lines is None else self.lines[position]
        return f"{self.label}:{number}"


def open_parquet(path: Path, label: str, scratch_path: Path, limit: int | None) -> TableRows:
    """Streams the first `limit` rows of a Parquet file into a scratch Arrow file."""
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=SPOOL_ROWS)
            _spool(scratch_path, file.schema_arrow, _first_rows(batches, limit))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{label} is not readable as Parquet ({first_line(error)})",
            "a Parquet file",
            "Write it again, or give the file its right suffix.",
        ) from None
    return TableRows(_from_file(scratch_path), label)


def open_csv(path: Path, label: str, scratch_path: Path, limit: int | None) -> TableRows:
    """Streams the first `limit` rows of a CSV file, all columns as text, into an Arrow file."""
    csv.field_size_limit(_CSV_FIELD_BYTES)
    lines: list[int] = []
    faults: dict[int, RowError] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            separator = "\t" if path.suffix == ".tsv" else ","
            reader = csv.reader(stream, strict=True, delimiter=separator)
            names = next(reader, [])
            _check_separator(names, label)
            if len(set(names)) != len(names):
                raise DataError(
                    f"{label}:1 names a column twice ({', '.join(names)})",
                    "a header of distinct names",
                    "Rename one.",
                )
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
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{label} is not readable as an Arrow stream ({first_line(error)})",
            "a file that `datasets` wrote",
            "Write it with save_to_disk, or as Parquet.",
        ) from None


def decompress(path: Path, copy: Path, label: str, compression: str) -> None:
    """Writes what a compressed file holds."""
    try:
        with pa.input_stream(str(path), compression=compression) as source, copy.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise DataError(
            f"{label} is not readable as {compression} ({first_line(error)})",
            f"a whole file of {compression}",
            "Copy it again, or give it its right suffix.",
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


def open_hub(
    name: str, config: str | None, split: str, revision: str | None, key: str
) -> TableRows:
    """Loads a hub data set, or a folder of data files, through `datasets`; `key` names it."""
    import datasets

    try:
        with during("network"):
            loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise hub_error(name, key, error) from None
    return TableRows(loaded, f"{name}[{split}]")


def hub_error(name: str, key: str, error: Exception) -> DataError:
    """What to tell when `datasets` does not load a data set; `key` names it in the config."""
    return DataError(
        f"{key}.path {name!r} is no file here, and `datasets` loads no such data set "
        f"({first_line(error)})",
        "a file, a folder, or the id, config and split of a hub data set",
        f"Correct {key}, download the data where there is a network, or set HF_TOKEN.",
    )


def digest_of_table(rows: TableRows) -> str:
    """Identity of a data set's content: its Arrow files, and which rows of them are taken."""
    files = [digest_of_file(Path(file["filename"])) for file in rows.dataset.cache_files]
    return digest_of([files, rows.dataset._fingerprint if not files else len(rows)])


def _check_separator(names: list[str], label: str) -> None:
    """Raises DataError at a header that other signs than the suffix says divide."""
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
