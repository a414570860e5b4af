"""Folders that count only as a whole: every file in a manifest, a marker that is written last.

    step-000200/
        ...              the files, at any depth
        MANIFEST.json    {"files": {"name": {"size": bytes, "sha256": hex}}}
        COMMITTED        {"manifest": hex SHA-256 of MANIFEST.json}

Only what the manifest names is looked at: a note, an editor's backup or a file that NFS keeps while
it is open is no damage.

Checkpoints hold pickles, which run code when they are opened. So a resume, the only one to unpickle
them without restrictions, asks `check_pickles` first who wrote them. Another owner is no damage: a
colleague's checkpoint stays where it is.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_dist.errors import CheckpointError
from dpo_dist.parsing import parse_json
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

    Raises CheckpointError when the folder is not committed, or when a committed file is missing,
    has another size or is a link; OSError when it cannot be read.
    """
    _check_plain(folder, stat.S_ISDIR, "folder")
    marker_path, manifest_path = folder / COMMIT_NAME, folder / MANIFEST_NAME
    if not os.path.lexists(marker_path):
        raise _damage(f"{folder} has no {COMMIT_NAME} marker")
    _check_plain(marker_path)
    expected = _read_json(marker_path).get("manifest")
    if not manifest_path.is_file() or digest_of_file(manifest_path) != expected:
        raise _damage(f"{manifest_path} is not the one that {COMMIT_NAME} names")
    files = _parse_manifest(manifest_path)
    if missing := [name for name in sorted(files) if not os.path.lexists(folder / name)]:
        raise _damage(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} files)")
    for path in _folders_within(files):
        _check_plain(folder / path, stat.S_ISDIR, "folder")
    for name, record in files.items():
        size = _check_plain(folder / name).st_size
        if size != record.size:
            raise _damage(f"{folder / name} has {size} bytes instead of {record.size}")
    return files


def check_pickles(folder: Path, trusted: Container[int] = ()) -> None:
    """Raises CheckpointError unless all that a resume opens in a committed folder may be opened.

    Its files belong to this user, or to one of the `trusted` user ids, and no pickle lies among
    them that was not committed: DeepSpeed looks for shards by pattern.
    """
    files = read_committed(folder)
    for name in ("", *_folders_within(files), COMMIT_NAME, MANIFEST_NAME, *files):
        owner = (folder / name).lstat().st_uid
        if owner != os.geteuid() and owner not in trusted:
            raise CheckpointError(
                f"{folder / name} belongs to user {owner}, this is user {os.geteuid()}",
                "checkpoint files of this user, because opening a pickle can run any code",
                f"If you trust who wrote it, set checkpoint.trusted_owners=[{owner}], or copy the "
                "run folder as this user and set run.dir to the copy.",
            )
    for path in sorted(folder.rglob("[!.]*.pt")):
        if path.relative_to(folder).as_posix() not in files:
            raise CheckpointError(
                f"{path} is not in the manifest",
                "only the pickles that were committed, because opening one can run any code",
                "Move it out of this folder.",
            )


def check_new_files(folder: Path, trusted: Container[int] = ()) -> None:
    """Raises CheckpointError unless this process may write files into a folder that are its own.

    A file system that maps owners would have every checkpoint refused at the next resume. A folder
    that is not there yet is written by whoever makes it: nobody asks first, since a rank may see it
    later than another, or lose it meanwhile.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            owner = os.fstat(stream.fileno()).st_uid
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror})",
            "a run folder that this user may write",
            "Change its permissions, or set another run.dir.",
        ) from None
    if owner != os.geteuid() and owner not in trusted:
        raise CheckpointError(
            f"what user {os.geteuid()} writes into {folder} belongs to user {owner}",
            "files of this user, because a resume opens pickles, which can run any code",
            "The file system maps owners, as with root_squash: run as a user that it leaves alone, "
            "put run.dir elsewhere, or, if you trust all who write as that user, set "
            f"checkpoint.trusted_owners=[{owner}].",
        )


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
    sizes = {
        path.relative_to(folder).as_posix(): _check_plain(path).st_size
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }

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


def _folders_within(files: Files) -> set[str]:
    """The folders between a committed folder and its files."""
    parents = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    return parents - {"."}


def _check_plain(
    path: Path, right_kind: Callable[[int], bool] = stat.S_ISREG, kind: str = "file"
) -> os.stat_result:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise _damage(f"{path} does not exist") from None
    if not right_kind(status.st_mode):
        raise _damage(f"{path} is a link or a special file, not a plain {kind}")
    return status


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
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
