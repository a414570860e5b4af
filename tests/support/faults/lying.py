"""Processes on a file system that lies (lying_files.c), and ranks forked from one that can."""

import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import ranks
from support.commands import as_command

SOURCE = Path(__file__).with_name("lying_files.c")
LIES = ("LIE_UNDER", "LIE_STATE", "LIE_FAIL", "LIE_FLOCK", "LIE_LINK", "LIE_OWNER", "LIE_LATE")
OTHER_USER = 777
LATE_MS = 3000
_another = ranks._server.__wrapped__  # pyright: ignore[reportPrivateUsage]
# what a mount can be like for good, by the variables of lying_files.c
MOUNTS = {
    "no flock": {"LIE_FLOCK": errno.ENOLCK},
    "no links": {"LIE_LINK": errno.EPERM},
    "late renames": {"LIE_LATE": LATE_MS},
    "another owner": {"LIE_OWNER": OTHER_USER},
}
MOUNTS["all at once"] = {name: value for lies in MOUNTS.values() for name, value in lies.items()}


@functools.cache
def library() -> Path:
    """The shared object, compiled once a session."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built = Path(tempfile.mkdtemp()) / "lying_files.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", built, SOURCE, "-ldl"],
        check=True,
    )
    return built


def lies_of(folder: Path, **lies: Any) -> dict[str, str]:
    """The environment in which all below `folder` is as `lies` say."""
    state = folder.with_name(f"{folder.name}.lies")
    state.mkdir(exist_ok=True)
    said = {name: str(value) for name, value in lies.items()}
    return {"LIE_UNDER": str(folder), "LIE_STATE": str(state)} | said


def once(operation: str, part: str, number: int, code: int) -> dict[str, str]:
    """The lie of a file that fails once: at this operation on a path that contains `part`."""
    return {"LIE_FAIL": f"{operation}:{part}:{number}:{code}"}


def told_to(folder: Path) -> list[str]:
    """The paths of which something failed."""
    state = folder.with_name(f"{folder.name}.lies")
    return [path.read_text() for path in sorted(state.glob("fired.*"))]


def in_processes(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a process of its own that is lied to."""
    return os.environ | environment | {"LD_PRELOAD": str(library())}


def as_process(*arguments: str) -> None:
    """A command that ends this process as it would end its own."""
    try:
        as_command(*arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))


def ranks_can_be_lied_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks ranks from a process with the library; what they are told is in this environment."""
    monkeypatch.setattr(ranks, "_server", _server)


@functools.cache
def _server() -> tuple[subprocess.Popen[bytes], Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library()))
        for name in LIES:  # a process keeps what it was told first
            patch.delenv(name, raising=False)
        return _another()
