"""The files that a path names: by a pattern such as `data/*.parquet`, compressed, or none.

The rows of several files are joined, one file behind the other.
"""

# pyright: basic
# (pyarrow has no types)

import difflib
import functools
import glob
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_dist.data.rows.json_rows import JsonRows
from dpo_dist.data.rows.row import Row
from dpo_dist.data.rows.table_rows import TableRows
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import IntArray
from dpo_dist.wording import first_line

_SIGNS = "*?["


@dataclass(frozen=True)
class JoinedRows:
    """Rows of several files of one kind; `label` is the pattern that names them."""

    parts: tuple[JsonRows | TableRows, ...]
    label: str

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The rows at these positions."""
        places = map(self._place, positions)
        for part, run in itertools.groupby(places, lambda place: place[0]):
            yield from self.parts[part].read([row for _, row in run])

    def origin(self, position: int) -> str:
        """Where a row lies, with the name of its own file."""
        part, row = self._place(position)
        return self.parts[part].origin(row)

    def num_bytes(self, position: int) -> int:
        """The length of a row in a text file; 0 in a table."""
        part, row = self._place(position)
        rows = self.parts[part]
        return rows.num_bytes(row) if isinstance(rows, JsonRows) else 0

    @functools.cached_property
    def _starts(self) -> IntArray:
        return np.cumsum([0, *map(len, self.parts)])[:-1]

    def _place(self, position: int) -> tuple[int, int]:
        """The part and the row in it; parts without rows are passed over."""
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return part, int(position - self._starts[part])


def is_pattern(path: str) -> bool:
    """Whether a path stands for all files that match it; one that is there stands for itself."""
    return any(sign in path for sign in _SIGNS) and not Path(path).expanduser().exists()


def matching_files(pattern: str, key: str) -> list[str]:
    """The files in the order of their names; raises DataError under the source's key for none."""
    full = str(Path(pattern).expanduser())
    files = sorted(path for path in glob.glob(full, recursive=True) if Path(path).is_file())
    if files:
        return files
    folder = _folder_of(full)
    hint = f"Correct it; paths are relative to {Path.cwd()}."
    if not folder.is_dir():
        hint = f"The folder {folder} does not exist."
    raise DataError(f"{key}.path {pattern} matches no file", "a pattern of data files", hint)


def missing_file(path: Path, key: str) -> DataError:
    """The error of a path that is not there; `key` names its source."""
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    if close:
        hint = f"Did you mean {path.parent / close[0]}?"
    elif path.parent.is_dir():
        hint = f"Correct it; paths are relative to {Path.cwd()}."
    else:
        hint = f"The folder {path.parent} does not exist either."
    return DataError(f"{key}.path {path} does not exist", "a file, folder or hub id", hint)


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


def name_of(path: str) -> str:
    """A source's name in reports: the file's stem, or the folder in which a pattern looks."""
    return (_folder_of(path).resolve().name if is_pattern(path) else "") or Path(path).stem


def _folder_of(pattern: str) -> Path:
    """The part of a pattern before its first sign."""
    parts = Path(pattern).parts
    plain = itertools.takewhile(lambda part: not any(sign in part for sign in _SIGNS), parts)
    return Path(*plain)
