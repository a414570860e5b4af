"""Writes the pairs folder: the kept rows of a scratch file, truncated and repeated as told."""

# pyright: basic
# (pyarrow has no types)

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_dist.data.drop_reasons import KEPT
from dpo_dist.data.pairs import DATA_NAME, SCHEMA, digest_of_keys
from dpo_dist.data.screening.tokenized_rows import PairColumns, read_scratch
from dpo_dist.reference.arrays import IntArray, KeyArray
from dpo_dist.reference.pair_key import KEY_BYTES, KEY_DTYPE, answer_key

# What `datasets` reads beside the Arrow file; it takes the columns from the file itself.
_DATASETS_STATE = {
    "_data_files": [{"filename": DATA_NAME}], "_fingerprint": "", "_format_columns": None,
    "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
}  # fmt: skip


def write_pairs(folder: Path, columns: PairColumns | None, scratch_path: Path) -> str:
    """Writes the kept pairs, truncated and repeated as told; None writes a split without pairs.

    Returns the digest of the pairs.
    """
    folder.mkdir(parents=True)
    keys: list[KeyArray] = [np.empty(0, dtype=KEY_DTYPE)]
    path = str(folder / DATA_NAME)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        if columns is not None:
            for batch, rows in _kept_batches(columns, scratch_path):
                writer.write_batch(_final_batch(batch, columns, rows))
                keys.append(columns.pair_keys[rows])
    digest = digest_of_keys(np.concatenate(keys))
    state = {**_DATASETS_STATE, "_fingerprint": digest[:16]}
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (folder / "dataset_info.json").write_text("{}\n")
    return digest


def truncate_lists(lists: pa.ListArray, lengths: IntArray) -> pa.ListArray:
    """The first `lengths[i]` items of every list."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    sizes = np.diff(offsets)
    within = np.arange(sizes.sum()) - np.repeat(offsets[:-1] - offsets[0], sizes)
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    kept = values[within < np.repeat(lengths, sizes)]
    new_offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, lengths))])
    return pa.ListArray.from_arrays(
        pa.array(new_offsets, pa.int32()), pa.array(kept), type=lists.type
    )


def _kept_batches(
    columns: PairColumns, scratch_path: Path
) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    """Scratch batches with only the kept rows, repeated, and those rows' numbers."""
    first = 0
    for batch in read_scratch(scratch_path):
        last = first + batch.num_rows
        kept = first + np.flatnonzero(columns.reasons[first:last] == KEPT)
        rows = np.repeat(kept, columns.copies[kept])
        if len(rows):
            yield batch.take(pa.array(rows - first)), rows
        first = last


def _final_batch(batch: pa.RecordBatch, columns: PairColumns, rows: IntArray) -> pa.RecordBatch:
    names = [columns.sources[index].name for index in columns.source[rows].tolist()]
    origins = [columns.origin(row) for row in rows.tolist()]
    prompts = batch["prompt_ids"]
    chosen = truncate_lists(batch["chosen_ids"], columns.chosen_lengths[rows])
    rejected = truncate_lists(batch["rejected_ids"], columns.rejected_lengths[rows])
    return pa.record_batch(
        [
            *(prompts, chosen, rejected),
            _key_array(columns.pair_keys[rows].tobytes()),
            pa.array(names, pa.string()),
            pa.array(origins, pa.string()),
            _key_array(columns.prompt_keys[rows].tobytes()),
            *(_key_array(_answer_keys(prompts, answers)) for answers in (chosen, rejected)),
        ],
        schema=SCHEMA,
    )


def _answer_keys(prompts: pa.ListArray, answers: pa.ListArray) -> bytes:
    rows = zip(prompts, answers, strict=True)
    return b"".join(answer_key(p.values.to_numpy(), a.values.to_numpy()) for p, a in rows)


def _key_array(keys: bytes) -> pa.FixedSizeBinaryArray:
    num_keys = len(keys) // KEY_BYTES
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), num_keys, [None, pa.py_buffer(keys)]
    )
