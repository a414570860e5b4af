"""Safetensors files read and written one tensor at a time.

A file is `<8-byte length><JSON header><data>`; the header gives every tensor's dtype, shape and
place. So a file whose names, shapes and dtypes are known beforehand can be written in any order,
each tensor straight to its place, with no more than that one tensor in memory. Reading is plain
`pread`: pages of a memory map would count as memory of this process until the file is closed.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.errors import ModelFilesError
from dpo_dist.run.manifest import write_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ALIGNMENT = 8  # of the data in the file
IO_BYTES = 1 << 30  # one read or write call moves at most 2 GiB
INDEX_NAME = "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """A tensor in a file: what it is, and at which byte of the file it begins."""

    path: Path
    offset: int
    spec: TensorSpec


def read_places(paths: Iterable[Path]) -> dict[str, Place]:
    """Where each tensor of some files lies, in the order of the files; reads headers only.

    Raises ModelFilesError for a file that is no safetensors file or cut short, for a dtype that
    is not one of DTYPES (quantized weights), and for a name that two files hold.
    """
    places: dict[str, Place] = {}
    for path in paths:
        for name, place in _read_header(path).items():
            if name in places:
                raise _unusable(path, f"holds {name}, which {places[name].path.name} holds too")
            places[name] = place
    return places


def read_tensor(place: Place) -> torch.Tensor:
    """Reads one tensor into memory of its own."""
    raw = torch.empty(place.spec.num_bytes, dtype=torch.uint8)
    buffer = raw.numpy().data
    with place.path.open("rb", buffering=0) as stream:
        stream.seek(place.offset)
        done = 0
        while done < len(buffer):
            count = stream.readinto(buffer[done : done + IO_BYTES])
            if not count:
                raise _unusable(place.path, f"ends {len(buffer) - done} bytes early")
            done += count
    return raw.view(place.spec.dtype).reshape(place.spec.shape)


class TensorFile:
    """One safetensors file, written tensor by tensor in any order.

    The file has its full size from the start (sparse where the file system can). It is opened
    for each write: a large model in small shards has more files than a process may hold open.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, self._offsets = _layout(specs)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._path = path
        with path.open("xb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.num_bytes for spec in specs.values()))

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
            while len(data):
                data = data[stream.write(data[:IO_BYTES]) :]

    def finish(self) -> None:
        """Says that nothing more comes."""
        assert not self._missing, f"{self._path} lacks {sorted(self._missing)}"


class ShardedModel:
    """Writes `model.safetensors`, or several shards and their index, tensor by tensor.

    A shard takes tensors in the given order while they fit into `max_shard_bytes`; a larger
    tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> None:
        groups = _group(specs, max_shard_bytes)
        count = len(groups)
        shards = {
            f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors": group
            for i, group in enumerate(groups, start=1)
        }
        self._files = {
            shard: TensorFile(folder / shard, {name: specs[name] for name in group})
            for shard, group in shards.items()
        }
        self._shard_of = {name: shard for shard, group in shards.items() for name in group}
        if count > 1:
            sizes = {
                "total_parameters": sum(spec.num_elements for spec in specs.values()),
                "total_size": sum(spec.num_bytes for spec in specs.values()),
            }
            write_json(folder / INDEX_NAME, {"metadata": sizes, "weight_map": self._shard_of})

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor into its shard."""
        self._files[self._shard_of[name]].write(name, tensor)

    def finish(self) -> None:
        """Says that nothing more comes."""
        for file in self._files.values():
            file.finish()


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
    """(the file up to its data, where in the file each tensor begins)."""
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
    text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
    start = _LENGTH.size + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in order}
    return _LENGTH.pack(len(text)) + text, offsets


def _read_header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
            raise _unusable(path, "is no safetensors file")
        text = stream.read(length)
    start = _LENGTH.size + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _unusable(path, "has no readable header") from None
    places = {}
    for name, (dtype, shape, begin, end) in found.items():
        if dtype not in DTYPES:
            raise ModelFilesError(
                f"{path} stores {name} as {dtype}",
                f"one of {', '.join(DTYPES)}",
                "Use the model's original, not a quantized copy.",
            )
        spec = TensorSpec(DTYPES[dtype], shape)
        if begin < 0 or end - begin != spec.num_bytes:
            raise _unusable(path, f"gives {name} {end - begin} bytes instead of {spec.num_bytes}")
        if start + end > size:
            raise _unusable(path, f"ends before {name} does")
        places[name] = Place(path, start + begin, spec)
    return places


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    return entry["dtype"], tuple(int(n) for n in entry["shape"]), int(begin), int(end)


def _unusable(path: Path, found: str) -> ModelFilesError:
    return ModelFilesError(
        f"{path} {found}", "a complete safetensors file", "Download or write the file again."
    )
