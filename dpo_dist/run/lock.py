"""One job at a time in a run folder, on whatever nodes: rank 0 of a stage holds a lock on a file.

The lock is the file system's own (flock), so it is gone with the process that held it, however that
ended. NFS carries it between nodes; a file system without locks is used without one.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import IO

from dpo_dist.errors import ArtifactError
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import POLL_S

# what a file system without locks answers
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_file(stream: IO[str]) -> bool:
    """Whether this process alone now holds an open file, until it closes it or ends."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


@contextlib.contextmanager
def held(paths: RunDir, stage: str, wait_s: float = 10.0) -> Iterator[None]:
    """Holds the run folder for a stage.

    Raises ArtifactError when another process still holds it after `wait_s` seconds, which a job
    that was started again gives its dying predecessor.
    """
    with _opened(paths) as lock:
        _take(lock, paths, wait_s)
        lock.truncate(0)
        lock.write(_who(stage))
        lock.flush()
        yield


def refuse_if_held(paths: RunDir, wait_s: float) -> None:
    """Raises ArtifactError when a stage of another job works in the run folder."""
    if paths.lock_path.exists():
        with _opened(paths) as lock:
            _take(lock, paths, wait_s)


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


def _take(lock: IO[str], paths: RunDir, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        if lock_file(lock):
            return
        if time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        lock.seek(0)
        raise ArtifactError(
            f"{paths.root} is in use ({lock.read() or 'by another job'})",
            "one job at a time in a run folder",
            "Wait for it, stop it, or set another run.dir.",
        )
