"""Safetensors files written one tensor at a time, their hashes taken on the way to disk.

A file whose names, shapes and dtypes are known beforehand can be written in any order, each tensor
straight to its place, with no more than that one tensor in memory.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dpo_dist.engine.weights.safetensors_reader import (
    DTYPES,
    HEADER_LENGTH,
    IO_BYTES,
    TensorSpec,
)
from dpo_dist.run.manifest import READ_BYTES, FileRecord, write_json
from dpo_dist.watch.heartbeat import beat

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the data in the file
INDEX_NAME = "model.safetensors.index.json"
Advance = Callable[[int], None]  # told the bytes of every tensor written; may raise to stop


@dataclass(frozen=True)
class TensorStream:
    """Tensors to write: what each of them is, known before any is read, and then each one once."""

    specs: Mapping[str, TensorSpec]  # by name, in the order of the output
    tensors: Iterator[tuple[str, torch.Tensor]]  # in any order

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())


def write_file(path: Path, stream: TensorStream, advance: Advance = lambda _: None) -> FileRecord:
    """Writes one safetensors file; its size and hash."""
    file = TensorFile(path, stream.specs)
    _write(stream, dict.fromkeys(stream.specs, file), advance)
    return file.finish()


def write_shards(
    folder: Path, stream: TensorStream, max_shard_bytes: int, advance: Advance = lambda _: None
) -> dict[str, FileRecord]:
    """Writes `model.safetensors`, or several shards and their index; sizes and hashes of the files.

    A shard takes tensors in the given order while they fit into `max_shard_bytes`; a larger
    tensor gets a shard of its own.
    """
    groups, specs = _group(stream.specs, max_shard_bytes), stream.specs
    count = len(groups)
    shards = {
        f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors": group
        for i, group in enumerate(groups, start=1)
    }
    files = {
        shard: TensorFile(folder / shard, {name: specs[name] for name in group})
        for shard, group in shards.items()
    }
    shard_of = {name: shard for shard, group in shards.items() for name in group}
    if count > 1:
        sizes = {
            "total_parameters": sum(spec.num_elements for spec in specs.values()),
            "total_size": stream.num_bytes,
        }
        write_json(folder / INDEX_NAME, {"metadata": sizes, "weight_map": shard_of})
    _write(stream, {name: files[shard] for name, shard in shard_of.items()}, advance)
    return {shard: file.finish() for shard, file in files.items()}


class TensorFile:
    """One safetensors file, written tensor by tensor in any order.

    The file has its full size from the start (sparse where the file system can). It is opened
    for each write: a large model in small shards has more files than a process may hold open.
    The hash is of bytes in memory, except for tensors that came before their turn in the file.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, self._offsets = _layout(specs)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._unhashed = deque(self._offsets)  # in the order of the file
        self._digest = hashlib.sha256(header)
        self._size = len(header) + sum(spec.num_bytes for spec in specs.values())
        self._path = path
        with path.open("xb") as stream:
            stream.write(header)
            stream.truncate(self._size)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, which must be what its spec says."""
        spec = self._specs[name]
        got = TensorSpec(tensor.dtype, tuple(tensor.shape))
        assert got == spec, f"{name}: {got} instead of {spec}"
        self._missing.remove(name)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        data = raw.numpy().data
        with self._path.open("r+b", buffering=0) as stream:
            stream.seek(self._offsets[name])
            left = data
            while len(left):
                left = left[stream.write(left[:IO_BYTES]) :]
                beat()
            if name == self._unhashed[0]:
                self._digest.update(data)
                self._unhashed.popleft()
                while self._unhashed and self._unhashed[0] not in self._missing:
                    self._hash_stored(stream, self._unhashed.popleft())

    def finish(self) -> FileRecord:
        """Says that nothing more comes; the size and the hash of the file."""
        assert not self._missing, f"{self._path} lacks {sorted(self._missing)}"
        return FileRecord(self._size, self._digest.hexdigest())

    def _hash_stored(self, stream: BinaryIO, name: str) -> None:
        stream.seek(self._offsets[name])
        left = self._specs[name].num_bytes
        while left:
            block = stream.read(min(left, READ_BYTES))
            assert block, f"{self._path} was cut short while it was written"
            self._digest.update(block)
            left -= len(block)


def _write(stream: TensorStream, files: Mapping[str, TensorFile], advance: Advance) -> None:
    """Writes every tensor into its file."""
    for name, tensor in stream.tensors:
        files[name].write(name, tensor)
        advance(stream.specs[name].num_bytes)
        del tensor  # before the next one is read


def _group(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.num_bytes
    return groups


def _layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """(the file up to its data, where each tensor begins, in the order of the file)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide types first: every tensor then begins at a multiple of its own element size
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    begin = 0
    for name in order:
        spec = specs[name]
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.num_bytes],
        }
        begin += spec.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(HEADER_LENGTH.size + len(text)) % ALIGNMENT)
    start = HEADER_LENGTH.size + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in order}
    return HEADER_LENGTH.pack(len(text)) + text, offsets
