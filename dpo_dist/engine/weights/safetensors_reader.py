"""Safetensors files read one tensor at a time.

A file is `<8-byte length><JSON header><data>`; the header gives every tensor's dtype, shape and
place. The data is read with plain reads: pages of a memory map would count as memory of this
process until the file is closed.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_dist.errors import ModelFilesError
from dpo_dist.parsing import parse_object
from dpo_dist.watch.heartbeat import beat

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
IO_BYTES = 1 << 30  # one read or write call moves at most 2 GiB
HEADER_LENGTH = struct.Struct("<Q")  # the file's first bytes


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
            beat()
    return raw.view(place.spec.dtype).reshape(place.spec.shape)


def _read_header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(HEADER_LENGTH.size)
        length = HEADER_LENGTH.unpack(prefix)[0] if len(prefix) == HEADER_LENGTH.size else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - HEADER_LENGTH.size):
            raise _unusable(path, "is no safetensors file")
        text = stream.read(length)
    start = HEADER_LENGTH.size + length
    try:
        header = parse_object(text)
        header.pop("__metadata__", None)
        found = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError):
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
        if end - begin != spec.num_bytes:
            raise _unusable(path, f"gives {name} {end - begin} bytes instead of {spec.num_bytes}")
        if start + end > size:
            raise _unusable(path, f"ends before {name} does")
        places[name] = Place(path, start + begin, spec)
    return places


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if type(dtype) is not str or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError("not a name, sizes and places")
    return dtype, shape, begin, end


def _unusable(path: Path, found: str) -> ModelFilesError:
    return ModelFilesError(
        f"{path} {found}", "a complete safetensors file", "Download or write the file again."
    )
