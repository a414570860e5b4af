"""Limits of a process, as `ulimit` sets them: failures that are real."""

import contextlib
import resource
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A soft limit of this process and of what it starts."""
    soft, hard = resource.getrlimit(kind)
    writes_bytecode = not sys.dont_write_bytecode
    if kind == resource.RLIMIT_FSIZE and writes_bytecode:
        # Python cuts off what it compiles at such a limit, keeps it, and can never import it again.
        sys.dont_write_bytecode = True
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
        sys.dont_write_bytecode = not writes_bytecode


def in_files_of(num_bytes: int, command: list[str]) -> list[str]:
    """The argv of a program whose files have at most `num_bytes`; what it compiles is not kept."""
    code = (
        "import os, resource, sys\n"
        "size = int(sys.argv[1])\n"
        "os.environ['PYTHONDONTWRITEBYTECODE'] = '1'\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "os.execvp(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", code, str(num_bytes), *command]
