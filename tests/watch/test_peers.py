"""What ranks tell each other, over real sockets."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dpo_dist.watch.peers import Line, Meeting, Pulse, Word

PULSE = Pulse(1, "far", "step", 5, 10.0, "train.py:7 _train", waits=True)


def test_words_go_both_ways_and_strangers_are_not_heard() -> None:
    first, second, stranger = (Line(rank, "127.0.0.1") for rank in (0, 1, 2))
    try:
        second.meet(first.meeting)
        stranger.meet(Meeting("127.0.0.1", first.meeting.port, "guessed"))
        second.say(Word(PULSE))
        stranger.say(Word(PULSE))
        stranger._socket.sendto(b"\xff{}", ("127.0.0.1", first.meeting.port))  # pyright: ignore[reportPrivateUsage]
        assert first.hear(0.2) == [Word(PULSE)]
        first.say(Word(PULSE, {"found": "x"}))
        began = time.monotonic()
        assert second.hear(60) == [Word(PULSE, {"found": "x"})]
        assert time.monotonic() - began < 30, "a verdict is told at once"
        assert stranger.hear(0.1) == []
        second.say_last(Word(PULSE))
        assert set(map(str, first.hear(0.2))) == {str(Word(PULSE))}
    finally:
        for line in (first, second, stranger):
            line.close()


def test_who_greets_is_known_on_both_ends_at_once() -> None:
    lines = [Line(rank, "127.0.0.1") for rank in (0, 1, 2)]
    try:
        for line in lines:
            line.meet(lines[0].meeting)
        with ThreadPoolExecutor(3) as pool:
            heard = [*pool.map(lambda line: line.greet(replace(PULSE, rank=line.rank), 3), lines)]
        assert [sorted(word.pulse.rank for word in words) for words in heard] == [[1, 2], [0], [0]]
        lines[0].close()
        lines[1].hear(0.5)  # what had been said by then
        assert lines[1].greet(PULSE, 3) == [], "and nobody waits for one that does not come"
    finally:
        for line in lines:
            line.close()


def test_nothing_waits_for_a_peer_that_is_gone() -> None:
    first, second = Line(0, "127.0.0.1"), Line(1, "127.0.0.1")
    second.meet(first.meeting)
    first.close()
    for _ in range(3):
        second.say(Word(PULSE))
        assert second.hear(0.05) == []
    second.close()
