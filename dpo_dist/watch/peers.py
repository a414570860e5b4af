"""What ranks tell each other of their progress: datagrams to rank 0, and its answers.

Datagrams, because nothing here may wait: not for a file system, not for a process that is stopped.
A lost one costs a second. Where a network drops them all, each rank watches itself alone.
"""

import contextlib
import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from dpo_dist.parsing import parse_json

MAX_BYTES = 8192
TIMES = 3  # that a last word is said, since one may be lost
GREETING_S = 2.0  # for first words to arrive, where any do
REPEAT_S = 0.05


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself."""

    rank: int
    host: str
    section: str
    beats: int
    limit: float | None  # seconds that its section may take for a beat
    where: str  # of its main thread
    waits: bool  # in a collective, for the others
    left: bool = False  # the group, at the end of its work or with an error


@dataclass(frozen=True)
class Word:
    """A datagram: a pulse, and from rank 0 the fields of the verdict once there is one."""

    pulse: Pulse
    verdict: dict[str, Any] | None = None


class Meeting(NamedTuple):
    """Where ranks find rank 0; the token keeps strangers out."""

    host: str
    port: int
    token: str


class Line:
    """A rank's end of the exchange with rank 0, which is on `host`."""

    def __init__(self, rank: int, host: str) -> None:
        self.rank = rank
        self._addresses: dict[int, Any] = {}
        family = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        if rank == 0:
            self._socket.bind(("", 0))
            port = int(self._socket.getsockname()[1])
            self.meeting = Meeting(host, port, secrets.token_hex(16))

    def meet(self, meeting: Meeting) -> None:
        """Takes what rank 0 said of where it is."""
        self.meeting = meeting
        if self.rank:
            self._addresses[0] = (meeting.host, meeting.port)

    def greet(self, pulse: Pulse, world_size: int) -> list[Word]:
        """The first words of rank 0, or to it of all others: from then on silence is noticed.

        Takes GREETING_S at most; whose word has not come by then is not in the answer.
        """
        heard: dict[int, Word] = {}
        missing = set(range(1, world_size)) if self.rank == 0 else {0}
        deadline = time.monotonic() + GREETING_S
        while missing - heard.keys() and time.monotonic() < deadline:
            self.say(Word(pulse))
            heard |= {word.pulse.rank: word for word in self.hear(REPEAT_S)}
        self.say_last(Word(pulse))  # to those who were heard last
        return list(heard.values())

    def say(self, word: Word) -> None:
        """To rank 0, or from it to all who have spoken."""
        message = json.dumps(asdict(word) | {"token": self.meeting.token}).encode()
        for address in list(self._addresses.values()):
            with contextlib.suppress(OSError):
                self._socket.sendto(message, address)

    def say_last(self, word: Word) -> None:
        """As `say`, for what is said only now."""
        for _ in range(TIMES):
            self.say(word)

    def hear(self, seconds: float) -> list[Word]:
        """What is said in the next seconds, or until a verdict is."""
        heard: list[Word] = []
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                message, address = self._socket.recvfrom(MAX_BYTES)
            except OSError:
                continue
            if (word := self._read(message)) is not None:
                if self.rank == 0:
                    self._addresses[word.pulse.rank] = address
                heard.append(word)
                if word.verdict is not None:
                    break
        return heard

    def close(self) -> None:
        """By the thread that hears: another one's file may get the number meanwhile."""
        self._socket.close()

    def _read(self, message: bytes) -> Word | None:
        try:
            fields = parse_json(message)
            if not secrets.compare_digest(fields["token"], self.meeting.token):
                return None
            return Word(Pulse(**fields["pulse"]), fields["verdict"])
        except (ValueError, KeyError, TypeError):  # a stranger's
            return None
