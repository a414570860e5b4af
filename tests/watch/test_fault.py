"""DPO_DIST_FAULT: what it says of faults that cannot be, and that it strikes once, where asked."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist.errors import ConfigError
from dpo_dist.watch import fault
from dpo_dist.wording import counted

HERE = "raise@wording:counted=2"


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    """The profiler of before (coverage's, say) is back after each test."""
    before = sys.getprofile()
    yield
    sys.setprofile(before)


def test_it_strikes_at_the_call_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, HERE)
    fault.arm(rank=0)
    counted(1, "ranks")
    with pytest.raises(fault.InjectedFaultError, match="at call 2 of dpo_dist.wording:counted"):
        counted(1, "ranks")


def test_another_rank_meets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, f"{HERE},rank=1")
    before = sys.getprofile()
    fault.arm(rank=0)
    assert sys.getprofile() is before
    fault.arm(rank=1)
    assert sys.getprofile() is not before


def test_with_a_file_it_strikes_once_whatever_starts_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(fault.VARIABLE, f"raise@wording:counted=1,once={tmp_path}/done")
    fault.arm(rank=0)
    with pytest.raises(fault.InjectedFaultError):
        counted(1, "ranks")
    fault.arm(rank=0)  # as in the process of a restart
    counted(1, "ranks")


@pytest.mark.parametrize("text", ["kill", "kill@train.step", "burn@train.step=3", "kill@step=3",
                                  "kill@train.step=3,host=a", "kill@train.step=3;"])  # fmt: skip
def test_a_fault_that_cannot_be_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, text)
    with pytest.raises(ConfigError) as refused:
        fault.arm(rank=0)
    assert str(refused.value).startswith(f"DPO_DIST_FAULT: {text.split(';')[-1]!r}")
    assert "ACTION@POINT=N[,rank=R][,once=FILE]" in str(refused.value)


def test_it_is_refused_outside_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "kill@train.step=3,rank=1")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(ConfigError) as refused:
        fault.arm(rank=0)
    assert "DPO_DIST_FAULT=kill@train.step=3,rank=1" in str(refused.value)
    assert "in tests only" in str(refused.value) and "Unset DPO_DIST_FAULT" in str(refused.value)


@pytest.mark.parametrize("point", sorted(fault.POINTS.values()))
def test_every_named_point_is_a_function(point: str) -> None:
    import importlib

    module, name = point.split(":")
    found = importlib.import_module(f"dpo_dist.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
