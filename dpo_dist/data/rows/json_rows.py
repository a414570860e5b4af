"""Where the rows of a JSON or JSON-lines file begin and end, without keeping the rows.

Both kinds of file end up as byte ranges with line numbers, so that any process can read any row,
and an error can name `file:line`.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpo_dist.data.rows.row import Row, RowError, as_object, type_name
from dpo_dist.errors import DataError
from dpo_dist.parsing import parse_json
from dpo_dist.reference.arrays import IntArray
from dpo_dist.watch.heartbeat import beat

Span = tuple[int, int, int]  # first byte, byte after the last, line number from 1

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
LINES_A_BEAT = 4096
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class JsonRows:
    """Rows of one file as byte ranges; `label` is the file's name in origins."""

    path: Path
    label: str
    starts: IntArray
    stops: IntArray
    lines: IntArray

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The rows at these positions; one that is no JSON object has a fault."""
        with self.path.open("rb") as stream:
            for position in positions:
                try:
                    yield self._read_one(stream, int(position))
                except RowError as error:
                    yield Row({}, self.origin(int(position)), fault=error)

    def origin(self, position: int) -> str:
        """`file:line` of a row."""
        return f"{self.label}:{self.lines[position]}"

    def num_bytes(self, position: int) -> int:
        """The length of a row in the file."""
        return int(self.stops[position] - self.starts[position])

    def _read_one(self, stream: BinaryIO, position: int) -> Row:
        origin, start = self.origin(position), int(self.starts[position])
        stream.seek(start)
        raw = stream.read(int(self.stops[position]) - start)
        try:
            value = parse_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(
                f"{origin} is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1})",
                "UTF-8 text",
                "Convert the file, for example with iconv.",
            ) from None
        except ValueError as error:
            raise _not_json(origin, error) from None
        fields = as_object(value)
        if fields is None:
            raise RowError(
                f"{origin} holds {type_name(value)}",
                "a JSON object with the fields of a preference row",
                "Correct or remove the row.",
            )
        return Row(fields, origin)


def index_json(path: Path, label: str, limit: int | None) -> JsonRows:
    """Finds the rows of a file: one object a line, an array, or {"data": [...]}.

    Stops after `limit` rows. Raises DataError when an array is damaged or the file is not text.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
        if head.startswith(_UTF16_BOMS):
            raise DataError(
                f"{label} is UTF-16 text", "UTF-8", "Convert it, for example with iconv."
            )
        offset = len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0
        stream.seek(offset)
        document = _is_document(stream)
    spans = _document_spans(path, label, offset) if document else _line_spans(path, offset)
    numbers = itertools.chain.from_iterable(itertools.islice(spans, limit))
    starts, stops, lines = np.fromiter(numbers, dtype=np.int64).reshape(-1, 3).T
    return JsonRows(path, label, starts, stops, lines)


def _is_document(stream: BinaryIO) -> bool:
    """Whether a file is one JSON value rather than one a line."""
    lines = (line for line in stream if line.strip())
    first = next(lines, b"").lstrip()
    if not first.startswith(b"{"):
        return first.startswith(b"[")
    try:
        value: Any = parse_json(first)
    except ValueError:
        # an object over several lines; a damaged line would be followed by another object
        return not next(lines, b"{").lstrip().startswith(b"{")
    return isinstance(value.get("data"), list) and next(lines, None) is None


def _line_spans(path: Path, offset: int) -> Iterator[Span]:
    with path.open("rb") as stream:
        stream.seek(offset)
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield offset, offset + len(line), number
            if number % LINES_A_BEAT == 0:
                beat()
            offset += len(line)


def _document_spans(path: Path, label: str, offset: int) -> Iterator[Span]:
    """Rows of an array; holds the text of the file, never its values.

    Latin-1 makes one character of every byte, so positions are byte offsets; the characters that
    give JSON its structure are ASCII and never part of a UTF-8 sequence.
    """
    text = path.read_bytes().decode("latin-1")
    decoder = json.JSONDecoder()
    line, counted, position = 1, 0, offset
    try:
        position, in_object = _array_start(text, offset, decoder)
        while text[position : position + 1] != "]":
            _, stop = decoder.raw_decode(text, position)
            line, counted = line + text.count("\n", counted, position), position
            beat()
            yield position, stop, line
            position = _skip(text, stop)
            if text[position : position + 1] == ",":
                position = _skip(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        _check_end(text, position, decoder, in_object)
    except json.JSONDecodeError as error:
        raise _not_json(f"{label}:{error.lineno}", error) from None
    except (RecursionError, ValueError) as error:  # a number of more than 4300 digits
        line += text.count("\n", counted, position)
        deep = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise _not_json(f"{label}:{line}", ValueError(deep)) from None


def _array_start(text: str, position: int, decoder: json.JSONDecoder) -> tuple[int, bool]:
    """Position of the first element of the top-level array, or of the one under "data", and
    whether it is the latter."""
    position = _skip(text, position)
    if text[position] == "[":
        return _skip(text, position + 1), False
    position = _skip(text, position + 1)
    while text[position : position + 1] == '"':
        key, position = _key(text, position, decoder)
        if key == "data" and text[position : position + 1] == "[":
            return _skip(text, position + 1), True
        _, position = decoder.raw_decode(text, position)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
    raise json.JSONDecodeError('No array, and no "data" array in the object', text, position)


def _check_end(text: str, position: int, decoder: json.JSONDecoder, in_object: bool) -> None:
    """Raises JSONDecodeError unless the file ends with the array, whose "]" is at `position`, or
    with its object: rows behind it would be lost in silence."""
    position = _skip(text, position + 1)
    if in_object:
        while text[position : position + 1] == ",":
            _, position = _key(text, _skip(text, position + 1), decoder)
            _, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
        if text[position : position + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' or '}'", text, position)
        position = _skip(text, position + 1)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _key(text: str, position: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """The key of an object's member, and where its value begins."""
    key, position = decoder.raw_decode(text, position)
    position = _skip(text, position)
    if text[position : position + 1] != ":":
        raise json.JSONDecodeError("Expecting ':'", text, position)
    return key, _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _not_json(origin: str, error: ValueError) -> RowError:
    where = (
        f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    )
    remedy = "Correct or remove it."
    if isinstance(error, json.JSONDecodeError) and error.doc[error.pos : error.pos + 1] == "'":
        remedy = "JSON has double quotes: write rows with json.dumps(row), not with str(row)."
    return RowError(f"{origin} is not JSON ({where})", "a JSON object", remedy)
