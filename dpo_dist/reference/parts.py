"""The part files of a reference store: written once, checked on every read, never changed.

    bytes 0-7    "DPOREF1\\n"
    bytes 8-39   SHA-256 of the scoring contract the rows were made under
    bytes 40-47  number of rows, little endian
    bytes 48-79  SHA-256 of bytes 0-47 and the rows
    from 80      rows of 24 bytes: 16-byte pair key, float32 chosen, float32 rejected

Many processes may publish into one folder at once without a lock. A part is written under a
temporary name and hard-linked to the first free number, which fails when another process took
that number, so all of them see the same parts in the same order. On a file system without hard
links an empty file, which only one process can create, takes the number; it stays.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import struct
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.reference.pair_key import KEY_DTYPE
from dpo_dist.run.manifest import fsync_dir, write_atomic

ROW_DTYPE = np.dtype([("key", KEY_DTYPE), ("logps", "<f4", (2,))])
QUARANTINE_NAME = "quarantine"
# what a file system without hard links answers
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_logger = logging.getLogger(__name__)
_MAGIC = b"DPOREF1\n"
_PREFIX = struct.Struct("<8s32sQ")
_HEADER_BYTES = _PREFIX.size + hashlib.sha256().digest_size
_PART_NAME = re.compile(r"part-(\d{6,})\.rows")

Rows = npt.NDArray[np.void]  # of ROW_DTYPE


def part_paths(directory: Path, known: Collection[str] = ()) -> list[Path]:
    """The parts in the order of their numbers; none when there is no such folder.

    Those whose names are `known` are left out.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    new = filter(_PART_NAME.fullmatch, set(names).difference(known))
    return [directory / name for name in sorted(new, key=_number)]


def num_rows_in(path: Path) -> int:
    """Rows of a part by its size, without reading it."""
    return max(path.stat().st_size - _HEADER_BYTES, 0) // ROW_DTYPE.itemsize


def publish_part(directory: Path, rows: Rows, contract_digest: str) -> None:
    """Makes the rows a part under the first free number; on return they are on disk for good."""
    temporary = directory / f".{secrets.token_hex(8)}.tmp"
    write_atomic(temporary, _encode(rows, bytes.fromhex(contract_digest)))
    try:
        taken = part_paths(directory)
        number = _number(taken[-1].name) + 1 if taken else 0
        # not a rename, which would replace the part of another process
        while not _try_link(temporary, directory / f"part-{number:06d}.rows"):
            number += 1
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(directory)


def read_part(path: Path, contract_digest: str) -> Rows | None:
    """The rows of a part; None, with a warning, when it was corrupt and has been put aside."""
    try:
        return _decode(path.read_bytes(), bytes.fromhex(contract_digest))
    except FileNotFoundError:  # another process has just put it aside
        return None
    except ValueError as reason:
        kept_as = _quarantine(path)
        _logger.warning(
            "%s is corrupt (%s): its rows count as missing, the file is kept as %s",
            path,
            reason,
            kept_as,
        )
        return None


def _number(name: str) -> int:
    match = _PART_NAME.fullmatch(name)
    assert match, f"{name} is no part name, expected {_PART_NAME.pattern}"
    return int(match[1])


def _try_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _rename_alone(source, target)
    return True


def _rename_alone(source: Path, target: Path) -> bool:
    try:
        target.with_name(f".{target.name}.taken").touch(exist_ok=False)
    except FileExistsError:
        return False
    if os.path.lexists(target):
        return False
    source.rename(target)
    return True


def _encode(rows: Rows, contract_digest: bytes) -> bytes:
    prefix, payload = _PREFIX.pack(_MAGIC, contract_digest, len(rows)), rows.tobytes()
    return prefix + hashlib.sha256(prefix + payload).digest() + payload


def _decode(content: bytes, contract_digest: bytes) -> Rows:
    """Raises ValueError, saying why, when the content is not a whole part of this contract."""
    if len(content) < _HEADER_BYTES:
        raise ValueError(f"{len(content)} bytes, the header alone has {_HEADER_BYTES}")
    prefix, payload = content[: _PREFIX.size], content[_HEADER_BYTES:]
    magic, contract, num_rows = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise ValueError("not a part of a reference store")
    if len(payload) != num_rows * ROW_DTYPE.itemsize:
        raise ValueError(f"{len(payload)} bytes of rows, {num_rows} rows were written")
    if hashlib.sha256(prefix + payload).digest() != content[_PREFIX.size : _HEADER_BYTES]:
        raise ValueError("checksum differs")
    if contract != contract_digest:
        raise ValueError("written under another scoring contract")
    rows = np.frombuffer(payload, dtype=ROW_DTYPE)
    if not np.isfinite(rows["logps"]).all():
        raise ValueError("holds numbers that are not finite")
    return rows


def _quarantine(path: Path) -> Path:
    target = path.parent / QUARANTINE_NAME / f"{path.name}.{time.time_ns()}"
    try:
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    except OSError:  # a read-only store, or another process did it: ignoring the part is enough
        return path
    return target
