"""Where preference rows come from: files, folders and hub data sets, and which rows are taken.

1. `open_sources` opens every source of a split as rows that can be read by position.
2. `select_rows` applies `limit` and `weight`: the positions to read and how often each counts.
"""

import contextlib
import difflib
import itertools
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpo_dist.data.formats import check_column_map, detect_format, rename_columns
from dpo_dist.data.json_rows import JsonRows, index_json
from dpo_dist.data.table_rows import (
    TableRows,
    digest_of_table,
    open_csv,
    open_folder,
    open_hub,
    open_parquet,
)
from dpo_dist.errors import DataError
from dpo_dist.manifest import digest_of_file
from dpo_dist.sections.data import PreferenceFormat, SourceSection

IntArray = npt.NDArray[np.int64]
Kind = Literal["json", "parquet", "csv", "folder", "hub"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
FOLDER_MARKS = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


@dataclass(frozen=True)
class Source:
    """An opened source; row `positions[i]` is read once and counts `copies[i]` times."""

    name: str
    rows: JsonRows | TableRows
    row_format: PreferenceFormat
    columns: dict[str, str]
    positions: IntArray
    copies: IntArray


def open_sources(sections: Sequence[SourceSection], split: str, scratch_dir: Path) -> list[Source]:
    """Opens the sources of a split; raises DataError, naming the config key or `file:line`."""
    sources: list[Source] = []
    for index, section in enumerate(sections):
        key = f"data.{split}.{index}"
        check_column_map(section.columns, key)
        rows = _open_rows(section, key, scratch_dir / f"{split}-{index}.arrow")
        if len(rows) == 0:
            raise DataError(f"{key}: {rows.label} has no rows", "preference rows", "Fill it.")
        positions, copies = select_rows(len(rows), section.limit, section.weight)
        if len(positions) == 0:
            raise DataError(
                f"{key}: weight {section.weight} of {len(rows)} rows takes none",
                "at least one row",
                f"Set {key}.weight to {1 / len(rows):.2g} or more.",
            )
        row_format = section.format
        if row_format == "auto":
            first = next(iter(rows.read(positions[:1])))
            row_format = detect_format(rename_columns(first, section.columns), key)
        name = _unique_name(section, [source.name for source in sources])
        sources.append(Source(name, rows, row_format, section.columns, positions, copies))
    return sources


def select_rows(num_rows: int, limit: int | None, weight: float) -> tuple[IntArray, IntArray]:
    """Positions of the rows to take, ascending, and how often each counts.

    Of the first `limit` rows, floor(rows * weight) are taken, evenly spread: the i-th is row
    floor(i / weight). So 0.5 takes every second row and 2 takes all of them twice.
    """
    available = min(num_rows, limit or num_rows)
    num_taken = int(available * weight + 1e-9)  # 0.29 * 100 is 28.999999999999996
    taken = (np.arange(num_taken) / weight + 1e-9).astype(np.int64)
    positions, copies = np.unique(np.minimum(taken, available - 1), return_counts=True)
    return positions, copies.astype(np.int64)


def digest_of_source(section: SourceSection, key: str) -> str:
    """Identity of what a source is read from: its bytes, not its name or its date."""
    path = Path(section.path).expanduser()
    kind = _kind(section, path, key)
    if kind in ("folder", "hub"):
        return digest_of_table(_open_data_set(kind, section, path, key))
    with _readable(section, key):
        return digest_of_file(path)


def _open_rows(section: SourceSection, key: str, scratch_path: Path) -> JsonRows | TableRows:
    path = Path(section.path).expanduser()
    kind = _kind(section, path, key)
    with _readable(section, key):
        match kind:
            case "json":
                return index_json(path, section.path, section.limit)
            case "parquet":
                return open_parquet(path, section.path, scratch_path, section.limit)
            case "csv":
                return open_csv(path, section.path, scratch_path, section.limit)
            case "folder" | "hub":
                return _open_data_set(kind, section, path, key)


def _kind(section: SourceSection, path: Path, key: str) -> Kind:
    if path.is_dir():
        return "folder" if any((path / mark).is_file() for mark in FOLDER_MARKS) else "hub"
    suffix = path.suffix.lower()
    if not path.exists():
        if section.path.startswith((".", "/", "~")) or section.path.count("/") > 1:
            raise _missing(path, key)
        if suffix in SUFFIXES:
            raise _missing(path, key)
        return "hub"
    if suffix not in SUFFIXES:
        raise DataError(
            f"{key}.path {section.path} ends in {suffix or 'no suffix'}",
            f"a file that ends in {', '.join(SUFFIXES)}",
            "Rename or convert it.",
        )
    return SUFFIXES[suffix]


def _open_data_set(kind: Kind, section: SourceSection, path: Path, key: str) -> TableRows:
    if kind == "folder":
        return open_folder(path, section.path, section.split)
    name = str(path) if path.is_dir() else section.path
    return open_hub(name, section.config, section.split, section.revision, key)


@contextlib.contextmanager
def _readable(section: SourceSection, key: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{key}.path {section.path} is not readable ({error.strerror or error})",
            "a readable file",
            "Check its permissions, and the space left in run.dir.",
        ) from None


def _missing(path: Path, key: str) -> DataError:
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    if close:
        hint = f"Did you mean {path.parent / close[0]}?"
    elif path.parent.is_dir():
        hint = f"Correct it; paths are relative to {Path.cwd()}."
    else:
        hint = f"The folder {path.parent} does not exist either."
    return DataError(f"{key}.path {path} does not exist", "a file, folder or hub id", hint)


def _unique_name(section: SourceSection, taken: Sequence[str]) -> str:
    """The name in reports: the given one, or the file's stem, numbered where it is taken."""
    name = section.name or Path(section.path).stem
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)
