"""A plugin of pytest: with UPDATE_DOCS, how the tests marked `fault` ended goes into the docs."""

import datetime
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.docs import fault_table


@dataclass
class Runs:
    """All cases of one test."""

    outcomes: list[str] = field(default_factory=list)  # passed, failed or skipped
    seconds: float = 0.0
    recovered_s: float | None = None  # the longest

    def __str__(self) -> str:
        tried = [outcome for outcome in self.outcomes if outcome != "skipped"]
        passed = tried.count("passed")
        said = "passed" if passed == len(tried) else "failed"
        if len(tried) > 1:
            said += f" {passed} of {len(tried)}"
        said += f", {datetime.date.today()}, {self.seconds:,.0f} s"
        if self.recovered_s is not None:
            said += f", recovered in {self.recovered_s:,.0f} s"
        return said


_runs: dict[fault_table.TestId, Runs] = {}
_marked: set[str] = set()


def pytest_collection_finish(session: pytest.Session) -> None:
    _marked.update(item.nodeid for item in session.items if item.get_closest_marker("fault"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid not in _marked:
        return
    path, _, test = report.nodeid.partition("::")
    runs = _runs.setdefault((path, test.split("[")[0]), Runs())
    runs.seconds += report.duration
    if report.when == "call" or report.outcome != "passed":
        runs.outcomes.append(report.outcome)
    if report.when == "call":
        values: list[Any] = [v for name, v in report.user_properties if name == "recovered_s"]
        runs.recovered_s = max([*values, runs.recovered_s], key=lambda value: value or 0.0)


def pytest_sessionfinish() -> None:
    ended = {test: str(runs) for test, runs in _runs.items() if {*runs.outcomes} - {"skipped"}}
    if ended and os.environ.get("UPDATE_DOCS"):
        page = fault_table.PAGE
        page.write_text(fault_table.refreshed(page.read_text(), ended))
