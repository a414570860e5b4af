"""What a user can get wrong or run into: an error says what it found, expected, and what to do."""

import contextlib
import errno
import pickle
import sys
from collections.abc import Iterator
from typing import ClassVar

EXIT_USER_ERROR = 2
# stopped by a signal with a checkpoint committed, or by a file system or a connection that was gone
# for a moment: start the same command again
EXIT_RESTART = 75
EXIT_DO_NOT_RESTART = 93  # a restart would end the same way
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# A server of files or of a connection was gone. ECONNREFUSED and ENETUNREACH are not here: they are
# what a wrong address and a node without a network answer, every time.
TRANSIENT_ERRORS = {
    errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ENETRESET, errno.EPIPE, errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}  # fmt: skip
# The same from HTTP clients, which this file does not import, where no OSError is behind it.
TRANSIENT_NAMES = {
    "TimeoutException", "RemoteProtocolError", "ServerDisconnectedError", "ClientPayloadError",
    "IncompleteRead", "SSLEOFError",
}  # fmt: skip
TRANSIENT_ANSWERS = {429, 502, 503, 504}


class DPODistError(Exception):
    """For the terminal: `found`, then `expected`, then `remedy`; the process exits 2.

    `transient` says that a restart may help, and that a rank exits 75 instead: the error tells of
    an exception that passes, such as one that was being handled when this one was made.
    """

    exit_code: ClassVar[int] = EXIT_USER_ERROR

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy
        self.transient = is_transient(sys.exception())

    def __str__(self) -> str:
        # what was found may be a list, a line each
        separator = "\n" if "\n" in self.found else "; "
        passing = "This may pass: start the same command again. If not: " if self.transient else ""
        return f"{self.found}{separator}expected {self.expected}. {passing}{self.remedy}"


class ConfigError(DPODistError):
    """The run config, an override or a DeepSpeed JSON is not usable."""


class DataError(DPODistError):
    """The preference rows are not usable."""


class ModelFilesError(DPODistError):
    """A model folder lacks a file, holds an unsafe one, or is not the expected model."""


class ArtifactError(DPODistError):
    """An artifact of an earlier stage is missing, stale or damaged."""


class ReferenceStoreError(DPODistError):
    """The reference store lacks rows, or holds rows of another scoring contract."""


class GateError(DPODistError):
    """The training engine does not reproduce the reference log-probs at step 0."""


class CheckpointError(DPODistError):
    """A checkpoint is damaged, foreign or of another run."""


class VerificationError(DPODistError):
    """The export does not reproduce the numbers of the training run; the process exits 1."""

    exit_code: ClassVar[int] = 1


class HubError(DPODistError):
    """The Hugging Face Hub, or a logging service, does not take what it is sent."""


class ClusterError(DPODistError):
    """A node, the network between nodes or the scheduler is not fit for the run."""


class EndpointError(DPODistError):
    """An API endpoint does not answer as it should."""


class HarnessError(DPODistError):
    """lm-eval is not installed, or cannot run a task."""


class DiskError(DPODistError):
    """A file cannot be written: the disk is full or read-only, or a quota or a limit is reached."""


def is_transient(error: BaseException | None) -> bool:
    """Whether an exception, or one behind it, is of a server that may be back in a moment."""
    while error is not None:
        if isinstance(error, DPODistError):
            return error.transient
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRORS:
            return True
        names = {kind.__name__ for kind in type(error).__mro__}
        answer = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, TimeoutError) or names & TRANSIENT_NAMES:
            return True
        if answer in TRANSIENT_ANSWERS:
            return True
        error = error.__cause__ or error.__context__
    return False


def portable(error: Exception) -> Exception:
    """The exception if it survives pickling, else one that does, with its name and text: sent to
    another process, it would be replaced by the complaint about it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        pass  # whatever a class of another library does when it is taken apart
    if not isinstance(error, DPODistError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    kind = next(base for base in type(error).__mro__ if base.__module__ == __name__)
    told = kind(error.found, error.expected, error.remedy)
    told.transient = error.transient
    return told


def as_disk_error(error: BaseException) -> DiskError | None:
    """What a disk that is full, read-only or gone for a moment is told as; None for other errors.

    A group is told as its first error when all of them are of the disk.
    """
    if isinstance(error, BaseExceptionGroup):
        told = [as_disk_error(inner) for inner in error.exceptions]
        return told[0] if all(told) else None
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS | TRANSIENT_ERRORS:
        return None
    where = f"{error.filename}: " if error.filename else ""
    found, passes = f"{where}{error.strerror or error}", error.errno in TRANSIENT_ERRORS
    told = DiskError(
        found,
        "a file system or a server that answers" if passes else "a writable disk with free space",
        "Mend it; what was done is kept."
        if passes
        else "Fix this, then start the same command again; what was done is kept.",
    )
    told.transient = passes
    return told


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """An OSError of the block names this file: the system does so only where one is opened."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def disk_errors_as(
    kind: type[DPODistError], found: str, expected: str, remedy: str
) -> Iterator[None]:
    """Raises an OSError of the block as `kind`, with the system's reason behind `found`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{found} ({error.strerror or error})", expected, remedy) from error
