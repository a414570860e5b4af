"""Durable files with their hash taken on the way to disk; what DeepSpeed saves through."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dpo_dist.engine.checkpoints.commit import FileRecord
from dpo_dist.errors import is_transient
from dpo_dist.run.manifest import fsync_dir
from dpo_dist.watch.heartbeat import beat


class ShardWriter:
    """Takes the place of DeepSpeed's checkpoint engine while one checkpoint is saved.

    A write that fails is remembered in `failure` instead of raised: this rank is between
    DeepSpeed's collectives then, and the other ranks would wait in the next one for ever.
    """

    def __init__(self, folder: Path, frozen_names: Iterable[str] = ()) -> None:
        self.folder = folder
        self.files: dict[str, FileRecord] = {}  # what this rank wrote, by name in the folder
        self.failure: str | None = None
        self.transient = False  # whether it is of a file system that may be back
        self._frozen_names = frozenset(frozen_names)

    def write(self, path: Path, content: Callable[[BinaryIO], Any]) -> None:
        """Writes one file through `content(stream)` and makes it durable."""
        if self.failure is not None:
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
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()  # the room may serve to write an error report
            self.failure = f"{path}: {error.strerror or error}"
            self.transient = is_transient(error)
            return
        record = FileRecord(stream.size, stream.digest.hexdigest())
        self.files[path.relative_to(self.folder).as_posix()] = record

    # From here on: what DeepSpeed calls.

    def create(self, info: Any) -> None:
        """Called before the first file; nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there already, agreed between the ranks."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one shard, without the second names of frozen parameters."""
        if "module" in state_dict:
            weights = state_dict["module"]
            kept = {name: weights[name] for name in weights if not self._is_frozen(name)}
            state_dict = state_dict | {"module": kept}
        self.write(Path(path), lambda stream: torch.save(state_dict, stream))

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


class _HashingStream:
    """A binary file to write to from start to end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            written = 0
            while written < len(view):  # an unbuffered write may take a part only
                written += self._raw.write(view[written:])
                beat()
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._raw.flush()
