"""The artifact of the prepare stage, as the other stages read it.

    pairs/
        train/ eval/     Arrow data sets that `datasets.load_from_disk` also opens
        MANIFEST.json    settings, digests of the inputs, and per split the digest of its pairs
        report.json      what was kept, dropped and noted

Columns: prompt_ids, chosen_ids, rejected_ids (lists of int32), pair_key (16 bytes), source,
origin. A token of an answer that is read and not scored, such as a tool's, is written ~id.
N pairs of a split.
"""

# pyright: basic
# (pyarrow has no types)

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from dpo_dist.errors import ArtifactError
from dpo_dist.reference.arrays import IdArray, IntArray, KeyArray
from dpo_dist.reference.pair_key import KEY_BYTES, KEY_DTYPE, pair_key
from dpo_dist.run.manifest import read_manifest
from dpo_dist.wording import first_line

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
DATA_NAME = "data-00000-of-00001.arrow"
BLOCK = 1 << 20
MANY = 16  # more than one pair in so many, and the lengths of all are found faster than theirs

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS),
        ("pair_key", pa.binary(KEY_BYTES)), ("source", pa.string()), ("origin", pa.string()),
    ]
)  # fmt: skip


class SplitDetails(BaseModel):
    """A split in the manifest."""

    num_pairs: int
    digest: str


class PairsDetails(BaseModel):
    """What the manifest says of the pairs."""

    splits: dict[str, SplitDetails]


@dataclass(frozen=True)
class Pairs:
    """The prepared pairs of a split, memory-mapped; index is the pair's position."""

    table: pa.Table
    folder: Path

    def __len__(self) -> int:
        return self.table.num_rows

    @functools.cached_property
    def keys(self) -> KeyArray:
        """(N,) 16-byte keys; compare them as an array only."""
        chunks = [key_column(chunk) for chunk in self._key_chunks]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=KEY_DTYPE)

    @functools.cached_property
    def prompt_lengths(self) -> IntArray:
        """(N,) tokens."""
        return list_lengths(self.table["prompt_ids"])

    @functools.cached_property
    def chosen_lengths(self) -> IntArray:
        """(N,) scored tokens."""
        return self._scored_lengths("chosen_ids")

    @functools.cached_property
    def rejected_lengths(self) -> IntArray:
        """(N,) scored tokens."""
        return self._scored_lengths("rejected_ids")

    @functools.cached_property
    def packed_lengths(self) -> IntArray:
        """(N,) tokens of prompt | chosen | rejected."""
        lengths = np.zeros(len(self), dtype=np.int64)
        for start in range(0, len(self), BLOCK):  # every rank holds the sum and little beside it
            for column in self._id_columns:
                lengths[start : start + BLOCK] += list_lengths(column.slice(start, BLOCK))
        return lengths

    @functools.cached_property
    def sources(self) -> npt.NDArray[np.str_]:
        """(N,) names of the sources."""
        codes = pc.call_function("dictionary_encode", [self.table["source"]]).combine_chunks()
        names = np.array(codes.dictionary.to_pylist(), dtype=np.str_)
        return names[codes.indices.to_numpy()]

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all keys in order, `digest_of_keys`: the identity of these pairs."""
        digest = hashlib.sha256()
        for chunk in self._key_chunks:  # where they lie in the file: many ranks need no more
            digest.update(key_column(chunk).data)
        return digest.hexdigest()

    def lengths_of(self, indices: Sequence[int] | IntArray) -> IntArray:
        """(B, 3) tokens of the prompts, and scored tokens of the chosen and the rejected answers.

        Which tokens are scored stands in the tokens, so only those of these pairs are read.
        """
        if len(indices) > len(self) // MANY:
            columns = (self.prompt_lengths, self.chosen_lengths, self.rejected_lengths)
            return np.stack([column[np.asarray(indices)] for column in columns], axis=1)
        counts = [self._lengths_of_one(int(index)) for index in indices]
        return np.array(counts, dtype=np.int64).reshape(-1, 3)

    @functools.cached_property
    def _lengths_of_one(self) -> Callable[[int], tuple[int, int, int]]:
        @functools.lru_cache(maxsize=1 << 14)  # every micro-batch asks for all pairs of its step
        def count(index: int) -> tuple[int, int, int]:
            prompt, chosen, rejected = self._ids(*self._place(index))
            return len(prompt), int((chosen >= 0).sum()), int((rejected >= 0).sum())

        return count

    def _scored_lengths(self, name: str) -> IntArray:
        counts = [scored_lengths(chunk) for chunk in self.table[name].chunks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *counts])

    def origin(self, index: int) -> str:
        """Where a pair came from, `file:line`."""
        return self.table["origin"][index].as_py()

    def identity(self, index: int) -> dict[str, str]:
        """The key of a pair, which data.leave_out takes, and where it came from."""
        key = self.table["pair_key"][index].as_py()
        return {"key": key.hex(), "origin": self.origin(index)}

    def token_ids(self, index: int) -> tuple[IdArray, IdArray, IdArray]:
        """Prompt, chosen and rejected ids as they lie in the file, (tokens,) int32, not to be
        written to; raises ArtifactError when they do not have their key."""
        number, row = self._place(index)
        prompt, chosen, rejected = self._ids(number, row)
        if self._key_chunks[number][row].as_py() != pair_key(prompt, chosen, rejected):
            raise _damaged(self.folder, f"pair {index} has other tokens than its key says")
        return prompt, chosen, rejected

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a pair's chunk, and its row there."""
        # not by ChunkedArray's own index, which walks over all chunks
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return number, index - int(self._first_rows[number])

    def _ids(self, number: int, row: int) -> tuple[IdArray, IdArray, IdArray]:
        prompt, chosen, rejected = (
            column.chunk(number)[row].values.to_numpy() for column in self._id_columns
        )
        return prompt, chosen, rejected

    @functools.cached_property
    def _key_chunks(self) -> list[pa.FixedSizeBinaryArray]:
        return self.table["pair_key"].chunks

    @functools.cached_property
    def _id_columns(self) -> list[pa.ChunkedArray]:
        return [self.table[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]

    @functools.cached_property
    def _first_rows(self) -> IntArray:
        """The index of the first pair of every chunk; all columns have the same chunks."""
        lengths = [len(chunk) for chunk in self._key_chunks]
        return np.cumsum([0, *lengths[:-1]])


def open_pairs(pairs_dir: Path, split: str) -> Pairs:
    """Opens a split; raises ArtifactError when it is missing or damaged."""
    expected = read_manifest(pairs_dir, PairsDetails).details["splits"].get(split)
    folder = pairs_dir / split
    if expected is None:
        raise _damaged(folder, "is not in the manifest")
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(folder / DATA_NAME))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, f"is not readable ({first_line(error)})") from None
    if table.schema != SCHEMA:
        raise _damaged(folder, f"has the columns {', '.join(table.schema.names)}")
    pairs = Pairs(table, folder)
    if pairs.digest != expected["digest"]:
        raise _damaged(folder, f"holds {len(pairs)} pairs that are not those of the manifest")
    return pairs


def digest_of_keys(keys: KeyArray) -> str:
    """Hex SHA-256 of (N,) keys in order."""
    return hashlib.sha256(keys.tobytes()).hexdigest()


def key_column(array: pa.FixedSizeBinaryArray) -> KeyArray:
    """(N,) keys of an Arrow column."""
    rows = np.frombuffer(array.buffers()[1], dtype=KEY_DTYPE)
    return rows[array.offset : array.offset + len(array)]


def list_lengths(column: pa.ListArray | pa.ChunkedArray) -> IntArray:
    """(N,) lengths of the lists of an Arrow column."""
    return pc.call_function("list_value_length", [column]).to_numpy().astype(np.int64)


def unmarked(ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """(T,) ids without the marks of what is not scored."""
    marked = np.asarray(ids, dtype=np.int32)
    return np.where(marked < 0, ~marked, marked)


def scored_lengths(lists: pa.ListArray) -> IntArray:
    """(N,) how many tokens of each list are scored; the others are negative."""
    scored = np.concatenate([[0], np.cumsum(lists.values.to_numpy() >= 0)])
    return np.diff(scored[lists.offsets.to_numpy()])


def _damaged(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} {what}",
        "prepared pairs as they were written",
        f"Delete {folder.parent} and run `dpo-dist prepare` again.",
    )
