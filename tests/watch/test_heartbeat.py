"""Signs of progress, and how long a section may take for one."""

import time

import pytest

from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.watch import heartbeat
from dpo_dist.watch.heartbeat import beat, during, limit_of, signs


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_heart", heartbeat._Heart())  # pyright: ignore[reportPrivateUsage]


def test_a_section_is_what_is_inside_the_block() -> None:
    assert signs() == (0, "load")
    with during("step"):
        beat()
        assert signs() == (2, "step"), "to enter is progress too"
        with during("checkpoint"):
            assert signs()[1] == "checkpoint"
        assert signs() == (4, "step")
    assert signs() == (5, "load")


def test_a_section_ends_with_an_error_too() -> None:
    @during("export")
    def work() -> None:
        assert signs()[1] == "export"
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):
            work()
    assert signs()[1] == "load"


def test_the_limit_follows_the_longest_beat_of_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WatchdogSection(step=60.0, evaluation=0.0, checkpoint=None)
    assert limit_of("step", settings) == 60
    now = time.monotonic()
    for seconds, limit in ((5, 60), (20, 200), (1, 200), (400, 1800)):
        now += seconds
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        with during("step"):
            heartbeat._heart.last = now - seconds  # pyright: ignore[reportPrivateUsage]
            beat()
        assert limit_of("step", settings) == limit, f"after {seconds} s"
    assert limit_of("reference", settings) == 600, "another section is not slower for that"
    assert limit_of("step", WatchdogSection(step=3600.0)) == 3600
    assert limit_of("evaluation", settings) is limit_of("checkpoint", settings) is None
    assert limit_of("network", settings) is None
