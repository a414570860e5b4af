"""Output blocks of the docs: found by a comment in front, compared with what is printed, refreshed.

    <!-- output of: dpo-dist train run.yaml -->

        step 1/10 train: loss 0.6931, margin 0.000
        ...

`last line of:` takes only that; of several comments in a row the outputs follow each other.

A line `...` stands for any lines. What is between is compared word by word, so that line breaks and
widths of tables do not matter. Numbers with a decimal point may differ by TOLERANCE, and what
VARIES matches may differ altogether.
"""

import difflib
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH = 120  # characters of a line on a page
TOLERANCE = 0.02  # relative; a tenth of it absolute
GAP = "..."
MARK = re.compile(r"<!-- (output|last line) of: (.+) -->")
INDENT = "    "
VARIES = (
    r"\d[\d.,]*(?= s\b)",  # how long it took
    r"\d[\d.,]*(?= \w+/s\b)",
    r"(?<=pairs/s)\s+[\d.]+",
    r"(?<=│) [\d.]+ +(?=│ (?:done|failed))",  # the same in a sweep's table
    r"(?<=% of a rank's )[\d.]+ GiB is [\d.]+(?= GiB)",  # memory of this machine
    r"(?<=free) +[\d.]+ GiB +in \S+",
    r"(?<=ago on )\S+ \(pid \d+\)",
    r"(?<=furthest )\S+ instead of \S+ \(\d+",  # a pair among equals
    r"\b(?=[a-f]*\d)[0-9a-f]{8,64}\b",  # digests
    r"^(?P<kept>host|cores|memory|free disk here|python|dpo-dist|torch|deepspeed) {2,}.*$",
)
_VARIES = re.compile("|".join(VARIES), re.MULTILINE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_TABLE_LINE = re.compile("[━─]+")


class NotFoundError(Exception):
    """A line of the page has no counterpart in the output: a person has to choose another."""


@dataclass(frozen=True)
class Block:
    """A code block without a language, and what it is said to be printed by."""

    page: Path
    start: int  # its first line on the page, from 0
    marks: tuple[tuple[str, str], ...]  # `output` or `last line`, and a command
    lines: tuple[str, ...]
    indent: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.start + 1}"


def blocks_of(page: Path) -> list[Block]:
    """The indented blocks of a page, and the fenced ones without a language."""
    lines = [*page.read_text().splitlines(), ""]
    blocks: list[Block] = []
    marks: list[tuple[str, str]] = []
    number = 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if mark := MARK.fullmatch(line):
            marks.append((mark[1], mark[2]))
        elif line.startswith("```"):
            number = lines.index("```", start + 1) + 1
            if line == "```":
                inside = tuple(lines[start + 1 : number - 1])
                blocks.append(Block(page, start + 1, tuple(marks), inside, ""))
            marks = []
        elif line.startswith(INDENT) and not lines[start - 1]:
            while lines[number].startswith(INDENT) or (
                not lines[number] and lines[min(number + 1, len(lines) - 1)].startswith(INDENT)
            ):
                number += 1
            inside = tuple(one.removeprefix(INDENT) for one in lines[start:number])
            blocks.append(Block(page, start, tuple(marks), inside, INDENT))
            marks = []
        elif line:
            assert not marks, f"{page.name}:{number} stands between a mark and its block"
    return blocks


def difference(block: Block, output: str) -> str | None:
    """What of the block the output does not have, None when it has all of it in this order."""
    words, position = _words(output), 0
    parts = _parts(block.lines)
    for index, part in enumerate(parts):
        expected = _words("\n".join(part))
        latest = len(words) - len(expected)
        # without a gap at its start or end the block starts or ends as the output does
        starts = range(latest if index == len(parts) - 1 else position, latest + 1)
        found = (s for s in starts if all(map(_alike, expected, words[s : s + len(expected)])))
        start = next((s for s in found if s >= position and (index or s == 0)), None)
        if start is None:
            return "\n".join(part)
        position = start + len(expected)
    return None


def refreshed(block: Block, output: str) -> list[str]:
    """The block with the lines of the output that correspond to its own, gaps where they were.

    Raises NotFoundError when a part's first or last line resembles no line of the output.
    """
    lines, position = output.splitlines(), 0
    kept: list[str] = []
    parts, gaps = _parts(block.lines), [one for one in block.lines if one.strip() == GAP]
    for index, part in enumerate(parts):
        kept += gaps[index - 1 : index]
        if not part:
            continue
        first = 0 if index == 0 else _closest(part[0], lines, position, position)
        end = len(lines) - 1
        if index < len(parts) - 1:
            end = _closest(part[-1], lines, first, first + len(part) - 1)
        kept += [piece for line in lines[first : end + 1] for piece in _wrapped(line, block)]
        position = end + 1
    return kept


def _parts(lines: Sequence[str]) -> list[list[str]]:
    """The lines between the gaps; the first or last part is empty where a gap is at that end."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == GAP:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


def _words(text: str) -> list[str]:
    masked = _VARIES.sub(lambda match: f"{match['kept'] or ''} # ", text)
    return _TABLE_LINE.sub("━", masked).split()


def _alike(word: str, other: str) -> bool:
    if word == other:
        return True
    if _NUMBER.sub("0", word) != _NUMBER.sub("0", other):
        return False
    return all(map(_close, _NUMBER.findall(word), _NUMBER.findall(other)))


def _close(number: str, other: str) -> bool:
    if "." not in number:
        return number == other
    one, two = (float(each.replace(",", "")) for each in (number, other))
    return math.isclose(one, two, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10)


def _closest(line: str, lines: Sequence[str], start: int, expected: int) -> int:
    """The line from `start` on that is most like `line`; of equals the one nearest `expected`."""
    line = line.strip()

    def likeness(number: int) -> float:
        pieces = [piece.strip() for piece in textwrap.wrap(lines[number], WIDTH)] or [""]
        alike = max(_ratio(_NUMBER.sub("0", line), _NUMBER.sub("0", piece)) for piece in pieces)
        # of lines that differ in numbers only, such as steps, the one with more of the same
        same = sum(word in lines[number].split() for word in line.split())
        return alike + 0.01 * same - 0.001 * abs(number - expected)

    best = max(range(start, len(lines)), key=likeness, default=None)
    if best is None or likeness(best) < 0.5:
        raise NotFoundError(f"nothing like {line!r} is printed any more")
    return best


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _wrapped(line: str, block: Block) -> list[str]:
    width = WIDTH - len(block.indent)
    if len(line) <= width or line[:1] in "┏┃┡│└┌├":
        return [line]
    hanging = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
