"""Where preference rows come from: files, folders and hub data sets, and which rows are taken.

1. `open_sources` opens every source of a split as rows that can be read by position, or, of a
   stream, once in order; `limit` is applied here.
2. `count_copies` applies `weight`: how often each row counts.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data_section import (
    JOINED_FORMATS,
    PairChoice,
    PreferenceFormat,
    SourceSection,
)
from dpo_dist.data.pairs import Split
from dpo_dist.data.rows.formats import (
    READ_COLUMNS,
    check_column_map,
    detected,
)
from dpo_dist.data.rows.joined_rows import (
    JoinedRows,
    decompress,
    is_pattern,
    matching_files,
    missing_file,
    name_of,
)
from dpo_dist.data.rows.json_rows import JsonRows, index_json
from dpo_dist.data.rows.row import Row
from dpo_dist.data.rows.stream_rows import StreamRows, digest_of_stream, open_hub
from dpo_dist.data.rows.table_rows import (
    TableRows,
    digest_of_table,
    open_arrow,
    open_csv,
    open_folder,
    open_parquet,
)
from dpo_dist.data.sources.labelled_rows import LabelledRows
from dpo_dist.data.sources.scored_rows import ScoredRows, joined_by_prompt
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import IntArray
from dpo_dist.run.manifest import digest_of, digest_of_file

Rows = JsonRows | TableRows | JoinedRows | LabelledRows | ScoredRows | StreamRows
Kind = Literal["json", "parquet", "csv", "arrow", "folder", "hub"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # by a further suffix
_LOOK_AT_ROWS = 100  # for one that tells the format
FOLDER_MARKS = ("state.json", "dataset_dict.json")  # what save_to_disk leaves


@dataclass(frozen=True)
class Source:
    """An opened source of a split."""

    name: str
    split: Split
    rows: Rows
    row_format: PreferenceFormat
    columns: dict[str, str]
    weight: float = 1.0
    min_score_margin: float | None = None
    pairs: PairChoice = "best_vs_worst"

    def positions(self) -> IntArray:
        """The rows that are taken, ascending; of a stream they are known only as it is read."""
        assert not isinstance(self.rows, StreamRows), self.name
        return np.flatnonzero(count_copies(np.arange(len(self.rows)), self.weight))


def open_sources(
    sections: Sequence[SourceSection],
    split: Split,
    scratch_dir: Path,
    taken_names: Sequence[str] = (),
) -> list[Source]:
    """Opens the sources of a split; raises DataError, naming the config key or `file:line`."""
    sources: list[Source] = []
    for index, section in enumerate(sections):
        key = f"data.{split}.{index}"
        check_column_map(section.columns, key)
        rows = _open_rows(section, key, scratch_dir / f"{split}-{index}.arrow")
        if next(_first_rows(rows), None) is None:
            raise DataError(f"{key}: {rows.label} has no rows", "preference rows", "Fill it.")
        columns, row_format = section.columns, section.format
        if row_format == "auto":
            columns, row_format = detected(_first_rows(rows), columns, key)
        if row_format in JOINED_FORMATS:
            rows, row_format = joined_by_prompt(rows, row_format, columns, key)
            columns = {}
        if row_format != "ranked" and section.pairs != Source.pairs:
            raise DataError(
                f"{key}.pairs is {section.pairs}, but {rows.label} has two answers in each row",
                "rows of several answers, with a score or a rank for each",
                f"Remove {key}.pairs.",
            )
        name = _unique_name(section, [*taken_names, *(source.name for source in sources)])
        choice = (section.weight, section.min_score_margin, section.pairs)
        sources.append(Source(name, split, rows, row_format, columns, *choice))
    return sources


def count_copies(positions: npt.ArrayLike, weight: float) -> IntArray:
    """How often the rows at these positions count: 0 or 1 below weight 1, else 1 or more.

    Row p counts as often as integers lie in [p * weight, (p + 1) * weight): 0.5 takes every second
    row and 2 takes all of them twice. It depends on no other row, so data that grow at their end
    keep the rows they had, and a stream takes what a file would.
    """
    rows = np.asarray(positions, dtype=np.int64)
    # without the small number 100 * 0.29 = 28.999999999999996 and its like decide
    first, last = (np.ceil(edge * weight - 1e-6) for edge in (rows, rows + 1))
    return (last - first).astype(np.int64)


def digest_of_source(section: SourceSection, key: str) -> str:
    """Identity of what a source is read from: its bytes, not its name or its date."""
    if is_pattern(section.path):
        return digest_of([digest_of_source(one, key) for one in _one_a_file(section, key)])
    path = Path(section.path).expanduser()
    kind = _kind(section, path, key)
    if section.streaming:
        return digest_of_stream(_stream(kind, section, path, key))
    if kind in ("folder", "hub"):
        return digest_of_table(_open_data_set(kind, section, path, key))
    with _readable(section, key):
        return digest_of_file(path)


def _open_rows(
    section: SourceSection, key: str, scratch_path: Path
) -> JsonRows | TableRows | JoinedRows | StreamRows:
    if is_pattern(section.path) and not section.streaming:
        return _open_files(section, key, scratch_path)
    path = Path(section.path).expanduser()
    kind = _kind(section, path, key)
    if section.streaming:
        return _stream(kind, section, path, key)
    return _open_one(kind, section, key, scratch_path)


def _open_files(section: SourceSection, key: str, scratch_path: Path) -> JoinedRows:
    """All files that a pattern names, up to the limit of the source."""
    sections = _one_a_file(section, key)
    kinds: dict[Kind, str] = {_kind(one, Path(one.path), key): one.path for one in sections}
    if len(kinds) > 1:
        found = ", ".join(f"{path} ({kind})" for kind, path in kinds.items())
        raise DataError(
            f"{key}.path {section.path} matches files of several kinds: {found}",
            "files of one kind",
            "Write a source for each kind, for example with the suffix in its pattern.",
        )
    (kind,) = kinds
    parts: list[JsonRows | TableRows] = []
    left = section.limit
    for number, one in enumerate(sections):
        if left == 0:
            break
        one = one.model_copy(update={"limit": left})
        scratch = scratch_path.with_stem(f"{scratch_path.stem}-{number}")
        parts.append(_open_one(kind, one, key, scratch))
        left = None if left is None else left - len(parts[-1])
    return JoinedRows(tuple(parts), section.path)


def _one_a_file(section: SourceSection, key: str) -> list[SourceSection]:
    """The source once for each file that its pattern names, in the order of their names."""
    return [section.model_copy(update={"path": path}) for path in matching_files(section.path, key)]


def _open_one(
    kind: Kind, section: SourceSection, key: str, scratch_path: Path
) -> JsonRows | TableRows:
    path = Path(section.path).expanduser()
    reads = READ_COLUMNS | {*section.columns.values()}
    with _readable(section, key):
        path = _decompressed(path, section.path, scratch_path)
        match kind:
            case "json":
                return index_json(path, section.path, section.limit)
            case "parquet":
                return open_parquet(path, section.path, scratch_path, section.limit, reads)
            case "csv":
                return open_csv(path, section.path, scratch_path, section.limit)
            case "arrow":
                return open_arrow(path, section.path).first(section.limit).reading(reads)
            case "folder" | "hub":
                rows = _open_data_set(kind, section, path, key).first(section.limit)
                return rows.reading(reads)


def _stream(kind: Kind, section: SourceSection, path: Path, key: str) -> StreamRows:
    if kind != "hub":
        raise DataError(
            f"{key}.streaming is true, but {section.path} is a file or folder of this machine",
            "a hub data set, or a folder of data files",
            "Remove streaming: such rows are read where they lie.",
        )
    name = str(path) if path.is_dir() else section.path
    revision = section.revision
    return StreamRows(name, section.config, section.split, revision, section.limit, key)


def _first_rows(rows: JsonRows | TableRows | JoinedRows | StreamRows) -> Iterator[Row]:
    if isinstance(rows, StreamRows):
        return itertools.islice(iter(rows), _LOOK_AT_ROWS)
    return rows.read(range(min(len(rows), _LOOK_AT_ROWS)))


def _kind(section: SourceSection, path: Path, key: str) -> Kind:
    if is_pattern(section.path):  # and streaming
        path = Path(matching_files(section.path, key)[0])
    if path.is_dir():
        return "folder" if any((path / mark).is_file() for mark in FOLDER_MARKS) else "hub"
    suffix = _inner(path).suffix.lower()
    if not path.exists():
        if section.path.startswith((".", "/", "~")) or section.path.count("/") > 1:
            raise missing_file(path, key)
        if suffix in SUFFIXES:
            raise missing_file(path, key)
        return "hub"
    if suffix not in SUFFIXES:
        raise DataError(
            f"{key}.path {section.path} ends in {suffix or 'no suffix'}",
            f"a file that ends in {', '.join(SUFFIXES)}, or one of them and "
            f"{', '.join(COMPRESSIONS)}",
            "Rename or convert it.",
        )
    return SUFFIXES[suffix]


def _inner(path: Path) -> Path:
    """The name without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def _decompressed(path: Path, label: str, scratch_path: Path) -> Path:
    """The file, or a copy of what is compressed in it, whose rows can be read by position."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path
    copy = scratch_path.with_suffix(_inner(path).suffix)
    decompress(path, copy, label, compression)
    return copy


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


def _unique_name(section: SourceSection, taken: Sequence[str]) -> str:
    """The name in reports: the given one, or the file's, numbered where it is taken."""
    name = section.name or name_of(section.path)
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)
