"""The helpers of the tests themselves: one name for each file, one process that forks ranks."""

import psutil
from support.import_names import import_names
from support.ranks import SERVER, run_ranks


def in_a_rank() -> dict[str, list[str]]:
    return import_names()


def test_every_file_has_one_import_name_here_and_in_a_rank() -> None:
    (of_a_test,) = run_ranks(1, in_a_rank)
    (of_a_helper,) = run_ranks(1, import_names)
    for names in (import_names(), of_a_test, of_a_helper):
        assert {"support/ranks.py", "support/import_names.py"} <= names.keys()
        assert {file: found for file, found in names.items() if len(found) > 1} == {}
    assert of_a_test["test_helpers.py"] == ["test_helpers"]
    assert of_a_helper["support/import_names.py"] == ["support.import_names"]


def test_one_process_forks_the_ranks() -> None:
    run_ranks(1, in_a_rank)
    run_ranks(1, import_names)
    servers = [child for child in psutil.Process().children() if SERVER in child.cmdline()]
    # support.faults.lying has one of its own
    assert len([each for each in servers if "LD_PRELOAD" not in each.environ()]) == 1
