"""Folders that count only as a whole: every file in a manifest, a marker that is written last.

    step-000200/
        ...              the files, at any depth
        MANIFEST.json    {"files": {"name": {"size": bytes, "sha256": hex}}}
        COMMITTED        {"manifest": hex SHA-256 of MANIFEST.json}

Checkpoints hold pickles, which run code when they are opened. So a folder is opened only when its
files are exactly those that were committed, are regular files, and belong to this user.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_dist.errors import CheckpointError
from dpo_dist.run.manifest import FileRecord, digest_of_file, fsync_dir, write_atomic, write_json
from dpo_dist.run.run_dir import COMMIT_NAME, MANIFEST_NAME

HASHING_THREADS = 8  # hashlib releases the interpreter lock; beyond this the disk is the limit


Files = Mapping[str, FileRecord]


def commit(folder: Path, files: Files) -> None:
    """Writes manifest and marker into a folder whose files are already durable."""
    manifest_path = folder / MANIFEST_NAME
    write_json(manifest_path, {"files": {name: asdict(files[name]) for name in sorted(files)}})
    write_json(folder / COMMIT_NAME, {"manifest": digest_of_file(manifest_path)})


def read_committed(folder: Path) -> dict[str, FileRecord]:
    """The files of a committed folder, after every check but the content of the files.

    Raises CheckpointError when the folder is not committed, when its files are not the committed
    ones by name and size, or when one is a link or belongs to another user; OSError when it
    cannot be read.
    """
    found = _sizes(folder)
    if COMMIT_NAME not in found:
        raise _damage(f"{folder} has no {COMMIT_NAME} marker")
    expected = _read_json(folder / COMMIT_NAME).get("manifest")
    if MANIFEST_NAME not in found or digest_of_file(folder / MANIFEST_NAME) != expected:
        raise _damage(f"{folder / MANIFEST_NAME} is not the one that {COMMIT_NAME} names")
    files = _parse_manifest(folder / MANIFEST_NAME)
    if missing := sorted(set(files) - set(found)):
        raise _damage(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} files)")
    if unlisted := sorted(set(found) - set(files) - {MANIFEST_NAME, COMMIT_NAME}):
        raise _damage(f"{folder / unlisted[0]} is not in the manifest")
    for name, record in files.items():
        if found[name] != record.size:
            raise _damage(f"{folder / name} has {found[name]} bytes instead of {record.size}")
    return files


def find_changed(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """Reads the named files and says which have another content than was committed."""
    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = pool.map(lambda name: digest_of_file(folder / name), names)
        return [
            f"{folder / name} has another content than was committed"
            for name, digest in zip(names, digests, strict=True)
            if digest != files[name].sha256
        ]


def verify(folder: Path) -> dict[str, FileRecord]:
    """The files of a committed folder after all checks; raises CheckpointError or OSError."""
    files = read_committed(folder)
    changed = find_changed(folder, files, files)
    if changed:
        raise _damage(changed[0])
    return files


def record_files(folder: Path, known: Files | None = None) -> dict[str, FileRecord]:
    """Makes the files that another program wrote durable and records them.

    Those in `known`, whose hash was taken while they were written, are not read again.
    """
    sizes = _sizes(folder)

    def record(name: str) -> FileRecord:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
        if known and name in known:
            size = known[name].size
            assert size == sizes[name], f"{name} has {sizes[name]} bytes instead of {size}"
            return known[name]
        return FileRecord(sizes[name], digest_of_file(folder / name))

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        records = dict(zip(sizes, pool.map(record, sizes), strict=True))
    for parent in {(folder / name).parent for name in sizes}:
        fsync_dir(parent)
    return records


def put_aside(folder: Path, quarantine_dir: Path, reason: str) -> Path:
    """Moves a folder into quarantine beside a text file that says why; returns its new path."""
    quarantine_dir.mkdir(exist_ok=True)
    target, attempt = quarantine_dir / folder.name, 1
    while os.path.lexists(target):
        attempt += 1
        target = quarantine_dir / f"{folder.name}.{attempt}"
    os.replace(folder, target)
    write_atomic(target.with_name(f"{target.name}.reason.txt"), f"{reason}\n")
    fsync_dir(folder.parent)
    return target


def remove(folder: Path) -> None:
    """Deletes a folder so that nobody sees half of it under its own name.

    A process that has its files open keeps reading them. What a network file system still holds
    stays under a hidden name for `remove_leftovers`.
    """
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Deletes the hidden folders that killed processes left behind."""
    for path in parent.glob(f".{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file below the folder by its relative name, refusing what is not ours."""
    _check_own(folder, stat.S_ISDIR, "folder")
    sizes = {}
    for path in sorted(folder.rglob("*")):  # does not follow links
        if path.is_dir() and not path.is_symlink():
            _check_own(path, stat.S_ISDIR, "folder")
        else:
            status = _check_own(path, stat.S_ISREG, "file")
            sizes[path.relative_to(folder).as_posix()] = status.st_size
    return sizes


def _check_own(path: Path, right_kind: Any, kind: str) -> os.stat_result:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise _damage(f"{path} does not exist") from None
    if not right_kind(status.st_mode):
        raise _damage(f"{path} is a link or a special file, not a plain {kind}")
    if status.st_uid != os.geteuid():
        raise CheckpointError(
            f"{path} belongs to user {status.st_uid}, this is user {os.geteuid()}",
            "checkpoint files of this user, because opening a pickle can run any code",
            "Copy the checkpoint as this user if you trust who wrote it.",
        )
    return status


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise _damage(f"{path} is not readable")


def _parse_manifest(path: Path) -> dict[str, FileRecord]:
    try:
        files = {n: FileRecord(**record) for n, record in _read_json(path)["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise _damage(f"{path} does not list files") from None
    for name in files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            raise _damage(f"{path} names {name!r}, which is not a file of the folder")
    return files


def _damage(found: str) -> CheckpointError:
    return CheckpointError(
        found, "a checkpoint as it was committed", "Use another checkpoint, or train anew."
    )
