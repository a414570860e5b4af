"""Every case of FAULTS.md has a test, and the table of docs/reliability.md is that of the marks."""

import os
from pathlib import Path

import pytest
from support.docs import fault_table
from support.docs.fault_runs import Runs

CASES = range(1, 41)


def test_every_case_has_a_test() -> None:
    assert {fault.number for fault in fault_table.scan()} == {*CASES}


def test_the_table_is_that_of_the_marks() -> None:
    page = fault_table.PAGE.read_text()
    expected = fault_table.refreshed(page, {})
    if os.environ.get("UPDATE_DOCS"):
        fault_table.PAGE.write_text(expected)
    else:
        assert page == expected, "UPDATE_DOCS=1 pytest tests/test_fault_table.py writes it anew"


MARKED = """
@pytest.mark.fault(13, "a bit " "flipped", becomes="refused")
@pytest.mark.fault(2, "a kill", "one step", becomes="restarted")
@pytest.mark.slow
def test_it() -> None: ...
"""


def test_marks_are_found_in_order(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(MARKED)
    place = ("tests/test_one.py", "test_it")
    assert fault_table.scan(tmp_path / "tests") == [
        fault_table.Fault(2, "a kill", "restarted", "one step", *place),
        fault_table.Fault(13, "a bit flipped", "refused", "nothing", *place),
    ]


def test_a_mark_without_an_outcome_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(MARKED.replace(', becomes="refused"', ""))
    with pytest.raises(TypeError, match="becomes"):
        fault_table.scan(tmp_path)


def test_what_did_not_run_keeps_what_it_had() -> None:
    page = fault_table.PAGE.read_text()
    first, *others = sorted(fault_table.last_runs(page))
    runs = {first: str(Runs(["passed", "skipped", "failed"], 61.2, 3.0))}
    found = fault_table.last_runs(fault_table.refreshed(page, runs))
    assert found[first].startswith("failed 1 of 2, 2")
    assert found[first].endswith(", 61 s, recovered in 3 s")
    assert [found[other] for other in others] == [*map(fault_table.last_runs(page).get, others)]
