"""Durable files with their hash taken on the way to disk; what DeepSpeed saves through.

Written at once, or, where the shards fit into host memory, copied there and written behind.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from dpo_dist.engine.checkpoints.commit import FileRecord
from dpo_dist.engine.checkpoints.host_copies import HostCopies, num_tensor_bytes
from dpo_dist.errors import is_transient
from dpo_dist.run.manifest import fsync_dir
from dpo_dist.watch.heartbeat import beat

PIECE_BYTES = 16 << 20  # that are written and hashed in turn


class Written(NamedTuple):
    """What one rank has written of a checkpoint, or why not."""

    files: dict[str, FileRecord]  # by name in the folder
    failure: str | None
    transient: bool  # whether it is of a file system that may be back


class ShardWriter:
    """Takes the place of DeepSpeed's checkpoint engine while one checkpoint is saved.

    A write that fails is remembered instead of raised: this rank is between DeepSpeed's collectives
    then, and the other ranks would wait in the next one for ever. With `copies` nothing is written
    before `catch_up`, which another thread may call.
    """

    def __init__(
        self, folder: Path, frozen_names: Iterable[str] = (), copies: HostCopies | None = None
    ) -> None:
        self.folder = folder
        self.written = Written({}, None, transient=False)
        self.num_bytes = 0  # of tensors, written or not
        self._frozen_names = frozenset(frozen_names)
        self._copies = copies
        self._behind: list[tuple[Path, Callable[[BinaryIO], Any]]] = []

    @property
    def is_behind(self) -> bool:
        """Whether files are left to write."""
        return bool(self._behind)

    def fail(self, reason: str, *, transient: bool = False) -> None:
        """Writes nothing more."""
        self.written = Written(self.written.files, reason, transient)

    def write(self, path: Path, content: Callable[[BinaryIO], Any]) -> None:
        """Writes one file through `content(stream)` and makes it durable, now or behind."""
        if self._copies is None:
            self._write(path, content)
        else:
            self._behind.append((path, content))

    def catch_up(self) -> None:
        """Writes what is left; the copies are free then."""
        while self._behind:
            self._write(*self._behind.pop(0))

    def _write(self, path: Path, content: Callable[[BinaryIO], Any]) -> None:
        if self.written.failure is not None:
            return
        try:
            with path.open("xb", buffering=0) as raw:
                stream = _HashingStream(raw)
                try:
                    content(stream)  # pyright: ignore[reportArgumentType]
                except RuntimeError:
                    if stream.error is None:
                        raise
                    # torch.save complains about its unfinished file and hides what happened
                    raise stream.error from None
                os.fsync(raw.fileno())
            fsync_dir(path.parent)
        except FileNotFoundError:
            self.fail(f"{self.folder} is not visible, run.dir must be on a shared file system")
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()  # the room may serve to write an error report
            self.fail(f"{path}: {error.strerror or error}", transient=is_transient(error))
            return
        record = FileRecord(stream.size, stream.digest.hexdigest())
        self.written.files[path.relative_to(self.folder).as_posix()] = record

    # From here on: what DeepSpeed calls.

    def create(self, info: Any) -> None:
        """Called before the first file; nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there already, agreed between the ranks."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one shard, without the second names of frozen parameters; a copy, behind."""
        if "module" in state_dict:
            weights = state_dict["module"]
            kept = {name: weights[name] for name in weights if not self._is_frozen(name)}
            state_dict = state_dict | {"module": kept}
        num_bytes = num_tensor_bytes(state_dict)
        self.num_bytes += num_bytes
        if self._copies is None or not self._copies.have_room(_kind(path), num_bytes):
            self._write(Path(path), lambda stream: torch.save(state_dict, stream))
        else:
            copied = self._copies.copy(state_dict)
            self.write(Path(path), lambda stream: torch.save(copied, stream))

    def _is_frozen(self, name: str) -> bool:
        """Also of the scales that a quantized weight brings along: `...weight.absmax`."""
        owner, separator, _ = name.partition(".weight.")
        return name in self._frozen_names or bool(
            separator and f"{owner}.weight" in self._frozen_names
        )

    def commit(self, info: Any) -> bool:
        """Called after the last file; the commit proper is agreed between the ranks."""
        return True

    def is_decoupled(self) -> bool:
        """Files are on disk when `save` returns."""
        return False


def _kind(path: str) -> str:
    """What a shard is called in any checkpoint: optim_states."""
    return "_".join(Path(path).stem.split("_")[-2:])


class _HashingStream:
    """A binary file to write to from start to end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            try:
                self._write(piece)
            except OSError as error:
                self.error = error
                raise
            self.digest.update(piece)
            self.size += len(piece)
        return len(view)

    def _write(self, piece: memoryview) -> None:
        written = 0
        while written < len(piece):  # an unbuffered write may take a part only
            written += self._raw.write(piece[written:])
            beat()
        # The disk begins at once, beside the hash, and not when fsync waits for it; nothing here
        # reads these pages again.
        os.posix_fadvise(self._raw.fileno(), self.size, len(piece), os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        self._raw.flush()
