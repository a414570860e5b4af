"""One job at a time in a run folder, on whatever nodes: rank 0 of a stage holds a lock on a file.

The lock is the file system's own (flock), so it is gone with the process that held it, however that
ended. NFS carries it between nodes; on a file system without locks a lease takes its place
(watch/lease.py), which outlives a dead node for a while.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dpo_dist.errors import ArtifactError
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import POLL_S
from dpo_dist.watch import lease

# what a file system without locks answers
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def alone_with(stream: IO[str], path: Path) -> Iterator[bool]:
    """Whether this process alone has the open file of a command, at `path`, in the block."""
    locked = _lock_file(stream)
    if locked is not None:
        yield locked
        return
    taken = lease.take(path.with_name(f".{path.name}.lease"), _who("this command"))
    if isinstance(taken, str):
        yield False
        return
    with lease.held(taken):
        yield True


@contextlib.contextmanager
def held(paths: RunDir, stage: str, wait_s: float = 10.0) -> Iterator[None]:
    """Holds the run folder for a stage.

    Raises ArtifactError when another process still holds it after `wait_s` seconds, which a job
    that was started again gives its dying predecessor.
    """
    with _opened(paths) as lock:
        if _take(lock, paths, wait_s):
            lock.truncate(0)
            lock.write(_who(stage))
            lock.flush()
            yield
            return
        with lease.held(_take_lease(paths, _who(stage), wait_s)):
            yield


def refuse_if_held(paths: RunDir, wait_s: float) -> None:
    """Raises ArtifactError when a stage of another job works in the run folder."""
    if paths.lock_path.exists():
        with _opened(paths) as lock:
            if not _take(lock, paths, wait_s):
                _wait(paths, lambda: lease.owner_of(paths.lease_dir), wait_s)


def _opened(paths: RunDir) -> IO[str]:
    """The first file that a stage writes: a folder of another user is found here."""
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        return paths.lock_path.open("a+", encoding="utf-8")
    except PermissionError as error:
        raise ArtifactError(
            f"{error.filename} cannot be written ({error.strerror}) by user {os.geteuid()}",
            "a run folder that this user may write",
            "Go on as the user who began the run, or copy its folder and set run.dir to the copy.",
        ) from None


def _who(stage: str) -> str:
    jobs = (os.environ.get(name) for name in ("SLURM_JOB_ID", "RAY_JOB_ID"))
    job = next((f"job {job}, " for job in jobs if job), "")
    return f"{job}{stage}, process {os.getpid()} on {socket.gethostname()}"


def _take(lock: IO[str], paths: RunDir, wait_s: float) -> bool:
    """Locks the file of a run; False where the file system has no locks."""
    has_locks = True

    def owner() -> str | None:
        nonlocal has_locks
        locked = _lock_file(lock)
        has_locks = locked is not None
        if locked is not False:
            return None
        lock.seek(0)
        return lock.read() or "another job"

    _wait(paths, owner, wait_s)
    return has_locks


def _take_lease(paths: RunDir, name: str, wait_s: float) -> lease.Lease:
    found: list[lease.Lease] = []

    def owner() -> str | None:
        taken = lease.take(paths.lease_dir, name)
        if isinstance(taken, str):
            return taken
        found.append(taken)
        return None

    _wait(paths, owner, wait_s)
    return found[0]


def _lock_file(stream: IO[str]) -> bool | None:
    """Whether this process alone now holds an open file, until it closes it or ends; None where
    the file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _wait(paths: RunDir, owner: Callable[[], str | None], wait_s: float) -> None:
    """Returns when nobody has the run folder; raises ArtifactError after `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while (name := owner()) is not None:
        if time.monotonic() >= deadline:
            raise ArtifactError(
                f"{paths.root} is in use ({name})",
                "one job at a time in a run folder",
                "Wait for it, stop it, or set another run.dir.",
            )
        time.sleep(POLL_S)
