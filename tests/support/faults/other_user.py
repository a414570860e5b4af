"""Files of another user, as root makes them: as from a colleague, or from NFS that maps owners."""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER_USER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can write as another user")


@contextlib.contextmanager
def files_of_another_user() -> Iterator[Path]:
    """A folder of a time when all that this process creates belongs to OTHER_USER.

    The kernel has a user id for the file system alone, which each thread may set. Nor may it write
    then what only root may.
    """
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders let no other user in
        Path(folder).chmod(0o777)
        libc, own = ctypes.CDLL(None), os.geteuid()
        libc.setfsuid(OTHER_USER)
        try:
            yield Path(folder)
        finally:
            libc.setfsuid(own)


def give_away(folder: Path) -> None:
    """Makes a folder with all that is in it another user's."""
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, OTHER_USER, -1, follow_symlinks=False)
