"""A folder for one process at a time on a file system without locks: numbered leases, a file each.

    000007    {"owner": "train, process 12 on node3", "pid": 12, ...}

The last number counts. Who wants the folder creates the next one, which only one process can
(O_EXCL: no rename, no link, no lock), once the last one is free: given back, of a process of this
machine that is gone, or not renewed for LIMIT_S by the clock of the file system. One that is taken
over is marked first, and its owner, who reads its own file every RENEW_S, leaves. Numbers are never
used twice: the files stay.
"""

import contextlib
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from dpo_dist.errors import EXIT_RESTART, EXIT_USER_ERROR, ArtifactError

RENEW_S = 5.0
# The ranks of an owner that says nothing leave after 120 s (watchdog.silent) and have 30 s for it;
# the rest is for a file system that tells of a renewal late.
LIMIT_S = 180.0
SETTLE = 2  # renewals: by then an owner that was taken over has noticed, if it runs at all
FREE, TAKEN = "{}\n", '{"taken": true}\n'  # given back; taken from one that may still run


def age_of(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system where this user may write.

    Clocks of hosts differ; the writer's and this one's are never compared unless this fails.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent) as fresh:
            now = os.fstat(fresh.fileno()).st_mtime
    except OSError:
        now = time.time()
    with path.open("rb") as stream:  # NFS asks the server when a file is opened
        return max(0.0, now - os.fstat(stream.fileno()).st_mtime)


@dataclass(frozen=True)
class Owner:
    """What is in the file: a name for people, and how to see on its machine whether it lives."""

    owner: str
    machine: str
    pid: int
    born: str
    token: str

    @classmethod
    def this_process(cls, name: str) -> "Owner":
        born = _process(os.getpid()) or ""
        return cls(name, _machine(), os.getpid(), born, secrets.token_hex(8))

    @property
    def is_gone(self) -> bool:
        """Known of a process of this machine only."""
        here = bool(self.machine) and self.machine == _machine()
        return here and _process(self.pid) != self.born


class Lease:
    """One that this process holds; a thread renews it."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self._text = path, text
        self._seen = time.monotonic()  # when it was last known to stand
        self._given_back = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self, *, now: bool = False) -> None:
        """Ends this process unless the lease stands, which it knows of a moment ago or asks."""
        if not now and time.monotonic() - self._seen < SETTLE * RENEW_S:
            return
        folder, began = self.path.parent, time.monotonic()
        if self.path.read_text() != self._text or _path(folder, int(self.path.name) + 1).exists():
            by = owner_of(folder) or "another job"
            _leave(f"{folder.parent} was taken over by {by}: this process stood still", False)
        self._seen = began

    def give_back(self) -> None:
        """Makes it free for the next one."""
        self._given_back.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then it is free when this process is gone
            if self.path.read_text() == self._text:
                self.path.write_text(FREE)

    def _renew(self) -> None:
        while not self._given_back.wait(RENEW_S):
            try:
                self.check(now=True)
                os.utime(self.path)
            except OSError as error:  # the next time may come through; nobody waits for ever
                if time.monotonic() - self._seen > LIMIT_S:
                    _leave(f"{self.path} cannot be renewed ({error.strerror})", True)


_held: list[Lease] = []  # by this process


def fence() -> None:
    """Before a write that others would see: ends this process if its lease was taken over."""
    for lease in _held:
        lease.check()


@contextlib.contextmanager
def held(lease: Lease) -> Iterator[None]:
    """The block is what the lease is for; `fence` knows of it."""
    _held.append(lease)
    try:
        yield
    finally:
        _held.remove(lease)
        lease.give_back()


def owner_of(folder: Path) -> str | None:
    """Who holds the folder now; None when it is free."""
    _, owner = _last(folder)
    return owner


def take(folder: Path, name: str) -> Lease | str:
    """A lease for this process, or who has the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    number, owner = _last(folder)
    if owner is not None:
        return owner
    may_run = number > 0 and _take_from(_path(folder, number))
    own = json.dumps(asdict(Owner.this_process(name))) + "\n"
    path = _path(folder, number + 1)
    try:
        with path.open("x") as stream:
            stream.write(own)
    except FileExistsError:
        return owner_of(folder) or "another job"
    lease = Lease(path, own)
    if may_run:
        time.sleep(SETTLE * RENEW_S)
        lease.check(now=True)
    return lease


def _last(folder: Path) -> tuple[int, str | None]:
    """(the last number, 0 without one; who holds it)."""
    try:
        numbers = [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except FileNotFoundError:
        return 0, None
    number = max(numbers, default=0)
    while _path(folder, number + 1).exists():  # a list may be older than a look
        number += 1
    if not number:
        return 0, None
    path = _path(folder, number)
    told = _told(text := path.read_text())
    if text in (FREE, TAKEN) or (told and told.is_gone) or age_of(path) > LIMIT_S:
        return number, None
    return number, told.owner if told else "another job"


def _take_from(path: Path) -> bool:
    """Marks a lease that is free; whether the one who had it may still run."""
    text = path.read_text()
    told = _told(text)
    if text == FREE or (told is not None and told.is_gone):
        return False
    path.write_text(TAKEN)
    return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def _told(text: str) -> Owner | None:
    """None for a file that is being written."""
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    """The machine since it was started, and what its process ids are counted in; "" if unknown."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process(pid: int) -> str | None:
    """When a process of this machine began, in ticks; None when there is none."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None


def _leave(found: str, again: bool) -> NoReturn:
    """Ends this process at once, whatever its main thread does."""
    error = ArtifactError(
        found,
        f"a lease that is renewed within {LIMIT_S:g} s",
        "This process writes nothing more, and what was committed is kept.",
    )
    os.write(sys.stderr.fileno(), f"error: {error}\n".encode())
    os._exit(EXIT_RESTART if again else EXIT_USER_ERROR)
