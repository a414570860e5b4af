"""When a stage hangs, and who is late: what rank 0 makes of the words of the others."""

from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.watch import heartbeat, watchdog
from dpo_dist.watch.heartbeat import beat, during
from dpo_dist.watch.peers import Line, Pulse, Word
from dpo_dist.watch.verdict import Verdict
from dpo_dist.watch.watchdog import Watchdog

SETTINGS = WatchdogSection(silent=20.0, step=10.0)
WAITING = Pulse(1, "far", "step", 5, 10.0, "train.py:7 _train", waits=True)


@pytest.fixture(autouse=True)
def in_a_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heartbeat, "_heart", heartbeat._Heart())  # pyright: ignore[reportPrivateUsage]
    with during("step"):
        yield


@pytest.fixture
def line() -> Iterator[Line]:
    end = Line(0, "127.0.0.1")
    yield end
    end.close()


def dog_of(rank: int, line: Line | None, settings: WatchdogSection = SETTINGS) -> Watchdog:
    dog = Watchdog(settings, rank, 2, lambda error, late: None)
    if line is not None:
        dog.join(line, 3, [])
    return dog


def test_a_rank_that_never_heard_of_rank_0_decides_for_itself(line: Line) -> None:
    """As where a network drops datagrams, or rank 0 stopped before its first word."""
    verdict = after(dog_of(1, line), line, 10)
    assert verdict is None
    verdict = after(dog_of(1, line), line, 12)
    assert verdict is not None and [rank["rank"] for rank in verdict.late] == [1]


def after(dog: Watchdog, line: Line | None, seconds: int, *pulses: Pulse) -> Verdict | None:
    """What is found within so many seconds, in each of which these ranks say the same."""
    for _ in range(seconds):
        if verdict := dog.look(line, [Word(pulse) for pulse in pulses], 1.0):
            return verdict
    return None


def test_a_process_alone_that_makes_no_progress() -> None:
    dog = dog_of(0, None)
    assert after(dog, None, 10) is None
    beat()
    assert after(dog, None, 10) is None, "it got further meanwhile"
    verdict = after(dog, None, 2)
    assert verdict is not None and [rank["section"] for rank in verdict.late] == ["step"]


@pytest.mark.fault(
    38,
    "a rank that is a hundred times slower, or works alone",
    becomes="left alone",
)
def test_a_rank_that_is_only_slow_is_left_alone(line: Line) -> None:
    """One that writes a file for all, or is a hundred times slower: the others wait for it."""
    dog = dog_of(0, line)
    for beats in range(100):
        working = replace(WAITING, beats=beats, waits=False)
        assert after(dog, line, 9, working, replace(WAITING, rank=2)) is None


def test_the_late_rank_is_the_one_that_is_stopped(line: Line) -> None:
    dog = dog_of(0, line)
    assert after(dog, line, 1, WAITING, replace(WAITING, rank=2)) is None
    verdict = after(dog, line, 12, WAITING)
    assert verdict is not None
    assert verdict.late == [{"rank": 2, "host": "far", "section": "step"}]


def test_the_late_rank_is_the_one_that_does_not_wait_for_others(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "place_of_main_thread", lambda: ("train.py:7 _train", True))
    dog, stuck = dog_of(0, line), replace(WAITING, rank=2, waits=False, where="records.py:9 save")
    verdict = after(dog, line, 12, WAITING, stuck)
    assert verdict is not None
    assert str(verdict.error()) == (
        "rank 2 on far in step (last at records.py:9 save): no rank got further for 10 s; expected "
        "some progress within 10 s (watchdog.step). The stacks are in the ranks' logs, and the "
        "launcher starts the stage again from what was committed. If it is always the same host, "
        "leave it out; if it was only slow, raise watchdog.step."
    )


def test_when_nothing_tells_them_apart_all_are_named(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "place_of_main_thread", lambda: ("train.py:7 _train", True))
    verdict = after(dog_of(0, line), line, 12, *(replace(WAITING, rank=r) for r in range(1, 12)))
    assert verdict is not None and len(verdict.late) == 12
    assert "and 4 more: no rank got further" in verdict.found


def test_a_rank_that_says_nothing_is_stopped_whatever_its_section_may_take(line: Line) -> None:
    dog = dog_of(0, line, SETTINGS.model_copy(update={"step": None}))
    assert after(dog, line, 1, replace(WAITING, limit=None)) is None
    assert after(dog, line, 19) is None
    verdict = after(dog, line, 1)
    assert verdict is not None
    assert verdict.found == "rank 1 on far in step (last at train.py:7 _train): no word for 20 s"
    assert verdict.expected == "one every 1 s, within 20 s" and verdict.key == "silent"


def test_a_rank_is_stopped_where_the_others_wait_for_it(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word may be a second older."""
    monkeypatch.setattr(watchdog, "place_of_main_thread", lambda: ("train.py:7 _train", True))
    dog = dog_of(0, line)
    assert after(dog, line, 1, replace(WAITING, section="step")) is None
    with during("evaluation"):
        verdict = after(dog, line, 20)
    assert verdict is not None and [rank["section"] for rank in verdict.late] == ["evaluation"]


def test_a_rank_that_left_is_no_longer_expected(line: Line) -> None:
    dog = dog_of(0, line, SETTINGS.model_copy(update={"step": None}))
    assert after(dog, line, 1, WAITING) is None
    assert after(dog, line, 1, replace(WAITING, left=True)) is None
    assert after(dog, line, 100) is None


def test_one_section_without_a_limit_is_waited_for(line: Line) -> None:
    downloading = replace(WAITING, section="network", limit=None)
    assert after(dog_of(0, line), line, 1000, downloading) is None


def test_a_rank_obeys_rank_0_and_judges_only_its_silence(line: Line) -> None:
    first = replace(WAITING, rank=0)
    dog = dog_of(1, line)
    assert after(dog, line, 100, first) is None, "rank 0 decides how long"
    told = Verdict("a", "b", "step", [{"rank": 2, "host": "far", "section": "step"}])
    assert dog.look(line, [Word(first, asdict(told))], 1.0) == told
    assert after(dog, line, 19) is None
    verdict = after(dog, line, 1)
    assert verdict is not None and [rank["rank"] for rank in verdict.late] == [0]


def test_a_rank_0_that_left_is_no_longer_expected(line: Line) -> None:
    dog = dog_of(1, line)
    assert after(dog, line, 1, replace(WAITING, rank=0, left=True)) is None
    assert dog.line is None
    assert after(dog, None, 9) is None
    assert after(dog, None, 3) is not None, "it watches itself again"


def test_off_means_off(line: Line) -> None:
    off = WatchdogSection.model_validate(dict.fromkeys(WatchdogSection.model_fields, 0))
    silent = replace(WAITING, limit=None)
    for dog, its_line in ((dog_of(0, None, off), None), (dog_of(0, line, off), line)):
        assert after(dog, its_line, 1, silent) is None and after(dog, its_line, 1000) is None
