"""The table of faults in docs/reliability.md: found in the marks of the tests, one row a mark.

    @pytest.mark.fault(13, "a bit flipped", becomes="refused by content")

The last column is of the last `make faults`. What that run left out keeps what it had.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- faults -->", "<!-- /faults -->"
HEAD = (
    "| case | injected | test | becomes | lost | last run |\n| --- | --- | --- | --- | --- | --- |"
)
NOT_YET = "not yet"
_ROW = re.compile(
    r"^\| \d+ \| .*\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\).* \| ([^|]*) \|$", re.M
)

TestId = tuple[str, str]  # the file from the root, and the function


@dataclass(frozen=True)
class Fault:
    """One mark of one test."""

    number: int
    injected: str
    becomes: str
    lost: str
    path: str
    test: str

    def row(self, last_run: str) -> str:
        link = f"[`{self.test}`](../{self.path})"
        cells = (str(self.number), self.injected, link, self.becomes, self.lost, last_run)
        return f"| {' | '.join(cells)} |"


def scan(tests: Path = ROOT / "tests") -> list[Fault]:
    """Every mark, in order of number, file and place; nothing is imported."""
    found = [
        Fault(path=path.relative_to(tests.parent).as_posix(), test=function.name, **mark)
        for path in sorted(tests.rglob("test_*.py"))
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        for mark in map(_fault_of, function.decorator_list)
        if mark
    ]
    return sorted(found, key=lambda fault: fault.number)


def _fault_of(decorator: ast.expr) -> dict[str, Any] | None:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.fault":
        return None
    named = {str(each.arg): ast.literal_eval(each.value) for each in decorator.keywords}
    return described(*map(ast.literal_eval, decorator.args), **named)


def described(number: int, injected: str, lost: str = "nothing", *, becomes: str) -> dict[str, Any]:
    """The arguments of a mark by name; fails as a wrong call does."""
    assert not any("|" in text for text in (injected, lost, becomes)), "it ends a cell"
    return {"number": number, "injected": injected, "lost": lost, "becomes": becomes}


def last_runs(page: str) -> dict[TestId, str]:
    """What the page says of the last run of each test."""
    return {(path, test): last for test, path, last in _ROW.findall(_between(page)[1])}


def refreshed(page: str, runs: Mapping[TestId, str]) -> str:
    """The page with the table of the marks, and of these runs where there are some."""
    known = last_runs(page) | runs
    before, _, after = _between(page)
    rows = [fault.row(known.get((fault.path, fault.test), NOT_YET)) for fault in scan()]
    return "".join([before, "\n", "\n".join([HEAD, *rows]), "\n", after])


def _between(page: str) -> tuple[str, str, str]:
    start, end = page.index(START) + len(START), page.index(END)
    return page[:start], page[start:end], page[end:]
