"""What a full disk is told as, whatever was being written."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from support.faults.limits import in_files_of

from dpo_dist.errors import CheckpointError, DataError, as_disk_error, disk_errors_as, portable


def test_only_errors_of_the_disk_are_told_as_such() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "out/pairs")
    assert str(as_disk_error(full)) == (
        "out/pairs: No space left on device; expected a writable disk with free space. "
        "Fix this, then start the same command again; what was done is kept."
    )
    assert as_disk_error(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None
    assert as_disk_error(ValueError()) is None
    group = ExceptionGroup("", [ExceptionGroup("", [full]), OSError(errno.EROFS, "Read-only")])
    assert str(as_disk_error(group)).startswith("out/pairs: No space left")
    other = ExceptionGroup("", [full, DataError("found", "expected", "Remedy.")])
    assert as_disk_error(other) is None


@pytest.mark.fault(15, "a file limit in a command", becomes="named; nothing half-written")
def test_a_disk_without_room_ends_a_command_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("model_name_or_path: a/b\ndataset_name: c/d\n")
    command = "import-trl trl.yaml --num-processes 1 --out run.yaml"
    done = subprocess.run(
        in_files_of(20, [sys.executable, "-m", "dpo_dist", *command.split()]),
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "File too large; expected a writable disk with free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["trl.yaml"], "nothing half-written"


USERS = ("ENOSPC", "EDQUOT", "EACCES", "EROFS", "ENOENT", "ECONNREFUSED", "ENETUNREACH")


@pytest.mark.fault(
    36,
    "ESTALE, EIO, ETIMEDOUT, ENOTCONN, ECONNRESET behind an error of ours",
    becomes="worth a restart; a full disk is not",
)
@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", *USERS])
def test_truth_11_what_may_pass_is_worth_a_restart(name: str) -> None:
    """Behind any of our errors, on this rank and as the others are told of it."""
    with (
        pytest.raises(CheckpointError) as told,
        disk_errors_as(CheckpointError, "found", "expected", "Remedy."),
    ):
        raise OSError(getattr(errno, name), "the system's word")
    assert told.value.transient == (name not in USERS)
    sent = portable(told.value)
    assert isinstance(sent, CheckpointError) and sent.transient == told.value.transient


class RemoteProtocolError(Exception):
    """As httpx names a server that hangs up."""


def test_truth_11_a_lost_connection_is_worth_a_restart() -> None:
    for lost in (RemoteProtocolError("hung up"), TimeoutError(), ConnectionResetError(104, "r")):
        try:
            raise lost
        except Exception:
            assert DataError("the hub gave none", "a hub", "Wait.").transient, lost
    assert not DataError("a wrong key", "another", "Correct it.").transient
