"""The streaming reader and writer against the safetensors library."""

import json
import os
import random
import re
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.faults.limits import limited

from dpo_dist.engine.weights.safetensors_reader import TensorSpec, read_places, read_tensor
from dpo_dist.engine.weights.safetensors_writer import (
    INDEX_NAME,
    TensorFile,
    TensorStream,
    write_file,
    write_shards,
)
from dpo_dist.errors import ModelFilesError
from dpo_dist.run.manifest import FileRecord, digest_of_file

TENSORS = {
    "flag": torch.tensor([True, False, True]),  # three bytes: what follows must still be aligned
    "weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(3.5),
    "count": torch.tensor([1, 2**40]),
    "nothing": torch.empty(0, 4),
    "größe": torch.ones(2, dtype=torch.float16),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def stream_of(tensors: dict[str, torch.Tensor], order: Iterable[str] | None = None) -> TensorStream:
    return TensorStream(specs_of(tensors), ((name, tensors[name]) for name in order or tensors))


def record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, digest_of_file(path))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    told: list[int] = []
    record = write_file(path, stream_of(TENSORS), told.append)
    assert_same(load_file(path), TENSORS)
    assert record == record_of(path)
    assert told == [spec.num_bytes for spec in specs_of(TENSORS).values()]


@pytest.mark.parametrize("seed", range(5))
def test_any_order_makes_the_same_file_and_hash(tmp_path: Path, seed: int) -> None:
    usual = write_file(tmp_path / "usual", stream_of(TENSORS))
    order = random.Random(seed).sample(list(TENSORS), len(TENSORS))
    record = write_file(tmp_path / "shuffled", stream_of(TENSORS, order))
    assert record == usual == record_of(tmp_path / "shuffled")


@pytest.mark.parametrize(("order", "megabytes_read"), [("ab", 0), ("ba", 8)])
def test_only_what_came_before_its_turn_is_read_back(
    tmp_path: Path, order: str, megabytes_read: int
) -> None:
    tensors = {name: torch.full((2 << 20,), number) for name, number in (("a", 1.0), ("b", 2.0))}
    before = bytes_read()
    record = write_file(tmp_path / "x", stream_of(tensors, order))
    assert round((bytes_read() - before) / 2**20) == megabytes_read
    assert record == record_of(tmp_path / "x")


def bytes_read() -> int:
    """By this process so far, from files or the page cache."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    places = read_places([tmp_path / "x.safetensors"])
    assert {name: place.spec for name, place in places.items()} == specs_of(TENSORS)
    assert_same({name: read_tensor(place) for name, place in places.items()}, TENSORS)


def test_a_view_is_written_by_its_values(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", stream_of({"w": TENSORS["weight"].T}))
    assert_same(load_file(tmp_path / "x.safetensors"), {"w": TENSORS["weight"].T})


def test_shards_hold_at_most_their_size(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((8, 8), float(i)) for i in range(5)}  # 256 bytes each
    tensors["large"] = torch.ones(400)
    records = write_shards(tmp_path, stream_of(tensors), max_shard_bytes=600)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_parameters": 720, "total_size": 2880}
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert records == {shard: record_of(tmp_path / shard) for shard in shards}
    loaded = {}
    for shard in shards:
        tensors_here = load_file(tmp_path / shard)
        assert set(tensors_here) == {n for n, s in index["weight_map"].items() if s == shard}
        loaded |= tensors_here
    assert_same(loaded, tensors)
    assert index["weight_map"]["large"] == shards[-1]
    assert list(index["weight_map"]) == list(tensors)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, stream_of(TENSORS), max_shard_bytes=1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(4) for i in range(100)}
    num_open = len(os.listdir("/proc/self/fd"))
    with limited(resource.RLIMIT_NOFILE, num_open + 10):
        write_shards(tmp_path, stream_of(tensors), max_shard_bytes=16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 100


def test_a_wrong_or_missing_tensor_is_a_programmers_mistake(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x.safetensors", {"w": TensorSpec(torch.float32, (2,))})
    with pytest.raises(AssertionError, match=r"w: .*float64.* instead of .*float32"):
        file.write("w", torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"lacks \['w'\]"):
        file.finish()


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFilesError) as error:
        read_places([path])
    assert str(error.value) == (
        f"{path} ends before w does; expected a complete safetensors file. "
        "Download or write the file again."
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is no safetensors file"),
        (b"<html>not found</html>", "is no safetensors file"),
        (struct.pack("<Q", 2**60), "is no safetensors file"),
        (struct.pack("<Q", 3) + b"[1]", "has no readable header"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "has no readable header"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFilesError, match=found):
        read_places([path])


def test_a_header_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelFilesError, match="gives w 8 bytes instead of 12"):
        read_places([path])


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFilesError) as error:
        read_places([tmp_path / "x.safetensors"])
    assert "stores w as F8_E4M3; expected one of F64, F32," in str(error.value)
    assert str(error.value).endswith("Use the model's original, not a quantized copy.")


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFilesError, match="holds w, which a.safetensors holds too"):
        read_places([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
