"""What the gate needs to know about every row, as numpy columns: about 100 bytes a row.

The token ids themselves stay in a scratch Arrow file. N rows read, in the order of the sources.
"""

# pyright: basic
# (pyarrow has no types)

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import DROP_REASONS, NOTE_BITS, TRUNCATED
from dpo_dist.data.pairs import Split, key_column, list_lengths, scored_lengths
from dpo_dist.data.screening.bad_rows import bad_rows, refuse_bad_rows
from dpo_dist.data.sources.sources import Source, count_copies
from dpo_dist.reference.arrays import IntArray, KeyArray
from dpo_dist.reference.pair_key import KEY_BYTES, pair_key
from dpo_dist.watch.heartbeat import beat

_IDS = pa.list_(pa.int32())
_KEY = pa.binary(KEY_BYTES)
# A batch of tokenized rows; the ids are not truncated.
SCHEMA = pa.schema(
    [
        ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS),
        ("source", pa.int32()), ("position", pa.int64()),
        ("reason", pa.int8()),  # KEPT or a code of DROP_REASONS
        ("notes", pa.uint8()),  # bits of NOTES
        ("detail", pa.string()),  # a refusing template's words, or what is lost
        ("pair_key", _KEY), ("swapped_key", _KEY),  # swapped: chosen and rejected exchanged
        ("prompt_key", _KEY),
        ("held_out", pa.bool_()),  # of the eval split
        ("score_margin", pa.float64()),  # null: no scores
    ]
)  # fmt: skip


@dataclass(frozen=True)
class PairColumns:
    """N rows of a split; lengths are token counts, keys are compared as arrays only."""

    sources: tuple[Source, ...]
    source: IntArray  # (N,) index into sources
    position: IntArray  # (N,) row of the source
    copies: IntArray  # (N,) how often the row counts
    reasons: IntArray  # (N,) KEPT or a code of DROP_REASONS
    notes: IntArray  # (N,) bits of NOTES
    prompt_lengths: IntArray
    chosen_lengths: IntArray  # with the tokens that are only read
    rejected_lengths: IntArray
    chosen_scored: IntArray
    rejected_scored: IntArray
    pair_keys: KeyArray
    swapped_keys: KeyArray
    prompt_keys: KeyArray
    score_margins: npt.NDArray[np.float64]  # (N,) NaN: no scores
    details: Mapping[str, Sequence[str]]  # reason -> `file:line: words`, in row order

    def __len__(self) -> int:
        return len(self.source)

    @property
    def longest(self) -> IntArray:
        """(N,) tokens of the prompt and the longer answer."""
        return self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)

    def origin(self, row: int) -> str:
        """Where a row lies, `file:line`."""
        return self.sources[self.source[row]].rows.origin(int(self.position[row]))


def collect(
    batches: Iterable[pa.RecordBatch],
    sources: Sequence[Source],
    scratch_paths: Mapping[Split, Path],
    settings: DataSection,
    advance: Callable[[int], None],
) -> dict[Split, PairColumns]:
    """Streams batches of SCHEMA to a scratch file a split and keeps their columns.

    `advance` is called with the number of rows of each batch. A split without rows is left out.
    Raises DataError for rows that cannot be read, unless `settings` allow them.
    """
    parts: dict[Split, list[dict[str, npt.NDArray]]] = {split: [] for split in scratch_paths}
    details: dict[Split, dict[str, list[str]]] = {split: {} for split in scratch_paths}
    num_rows: dict[Split, int] = dict.fromkeys(scratch_paths, 0)
    with contextlib.ExitStack() as stack:
        writers: dict[Split, Any] = {
            split: stack.enter_context(
                pa.ipc.new_stream(stack.enter_context(pa.OSFile(str(path), "wb")), SCHEMA)
            )
            for split, path in scratch_paths.items()
        }
        for batch in batches:
            held_out = batch["held_out"].to_numpy(zero_copy_only=False)
            for split, writer in writers.items():
                part = batch.filter(pa.array(held_out == (split == "eval")))
                if part.num_rows:
                    writer.write_batch(part)
                    parts[split].append(_columns_of(part))
                    num_rows[split] += _num_rows(part)
                    _add_details(details[split], part)
                    if settings.on_bad_row == "raise":
                        bad = bad_rows(details[split])
                        refuse_bad_rows(bad, num_rows[split], split, settings, at_end=False)
            advance(_num_rows(batch))
            beat()
    found: dict[Split, PairColumns] = {}
    for split, columns in parts.items():
        if columns:
            joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
            copies = _copies(sources, split, joined["source"], joined["position"])
            bad = bad_rows(details[split])
            refuse_bad_rows(bad, num_rows[split], split, settings, at_end=True)
            found[split] = PairColumns(
                sources=tuple(sources), copies=copies, details=details[split], **joined
            )
    return found


def read_scratch(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a scratch file, one at a time (not mapped, so memory stays one batch)."""
    with pa.OSFile(str(path), "rb") as stream, pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            yield batch
            beat()


def truncate(columns: PairColumns, scratch_path: Path, max_length: int) -> PairColumns:
    """Cuts the ends of answers so that prompt + answer is at most `max_length` tokens.

    A prompt is never cut; where it leaves no room the answers have length 0. The keys of the
    pairs that change are those of the remaining ids.
    """
    room = np.maximum(max_length - columns.prompt_lengths, 0)
    chosen_lengths = np.minimum(columns.chosen_lengths, room)
    rejected_lengths = np.minimum(columns.rejected_lengths, room)
    cut = (chosen_lengths < columns.chosen_lengths) | (rejected_lengths < columns.rejected_lengths)
    pair_keys, swapped_keys = columns.pair_keys.copy(), columns.swapped_keys.copy()
    chosen_scored, rejected_scored = columns.chosen_scored.copy(), columns.rejected_scored.copy()
    first = 0
    for batch in read_scratch(scratch_path):
        for row in np.flatnonzero(cut[first : first + batch.num_rows]).tolist():
            prompt = batch["prompt_ids"][row].values.to_numpy()
            chosen = batch["chosen_ids"][row].values.to_numpy()[: chosen_lengths[first + row]]
            rejected = batch["rejected_ids"][row].values.to_numpy()[: rejected_lengths[first + row]]
            keys = pair_key(prompt, chosen, rejected), pair_key(prompt, rejected, chosen)
            pair_keys[first + row], swapped_keys[first + row] = keys
            scored = np.sum(chosen >= 0), np.sum(rejected >= 0)
            chosen_scored[first + row], rejected_scored[first + row] = scored
        first += batch.num_rows
    return replace(
        columns,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_scored=chosen_scored,
        rejected_scored=rejected_scored,
        pair_keys=pair_keys,
        swapped_keys=swapped_keys,
        notes=columns.notes | np.where(cut, NOTE_BITS[TRUNCATED], 0),
    )


def _num_rows(batch: pa.RecordBatch) -> int:
    """Rows of a source in a batch of it: several pairs may be one."""
    return len(np.unique(batch["position"]))


def _add_details(details: dict[str, list[str]], batch: pa.RecordBatch) -> None:
    said = batch.filter(batch["detail"].is_valid())
    for code, text in zip(said["reason"].to_pylist(), said["detail"].to_pylist(), strict=True):
        details.setdefault(DROP_REASONS[code - 1].name, []).append(text)


def _copies(
    sources: Sequence[Source], split: Split, source: IntArray, position: IntArray
) -> IntArray:
    """How often rows count; one that is held out of a training source counts once."""
    copies = np.ones(len(source), dtype=np.int64)
    for index, opened in enumerate(sources):
        if opened.split == split:
            rows = source == index
            copies[rows] = count_copies(position[rows], opened.weight)
    return copies


def _columns_of(batch: pa.RecordBatch) -> dict[str, npt.NDArray]:
    columns: dict[str, npt.NDArray] = {
        f"{part}_lengths": list_lengths(batch[f"{part}_ids"])
        for part in ("prompt", "chosen", "rejected")
    }
    for part in ("chosen", "rejected"):
        columns[f"{part}_scored"] = scored_lengths(batch[f"{part}_ids"])
    for name, ours in (("reason", "reasons"), ("notes", "notes"), ("source", "source")):
        columns[ours] = batch[name].to_numpy().astype(np.int64)
    columns["position"] = batch["position"].to_numpy()
    columns["score_margins"] = batch["score_margin"].to_numpy(zero_copy_only=False)
    for name in ("pair", "swapped", "prompt"):
        columns[f"{name}_keys"] = key_column(batch[f"{name}_key"])
    return columns
