"""Tokenizing rows in parallel: chunks of rows in, Arrow record batches of token ids out, in order.

The processes come from a fork server that has loaded the tokenizer library: no thread of the
parent is copied in the middle of something, and a process that is killed is noticed.
`datasets.map` was not taken because it wants all rows in one typed table first, where messages
with different keys do not fit, and loses the `file:line` of an error.
"""

# pyright: basic
# (pyarrow has no types)

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import (
    BAD_ROW,
    CODES,
    EMPTY,
    KEPT,
    LOST_TEXT,
    LOW_MARGIN,
    NO_PREFERENCE,
    TEMPLATE,
)
from dpo_dist.data.rows.dialogues import NoPair
from dpo_dist.data.rows.formats import read_pair, rename_columns, score_margin
from dpo_dist.data.rows.joined_rows import JoinedRows
from dpo_dist.data.rows.json_rows import JsonRows
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row, RowError
from dpo_dist.data.rows.stream_rows import StreamRows
from dpo_dist.data.screening.bad_rows import BadRow
from dpo_dist.data.screening.held_out import is_held_out
from dpo_dist.data.screening.tokenized_rows import SCHEMA
from dpo_dist.data.sources.ranked_rows import pair_rows
from dpo_dist.data.sources.sources import Source, count_copies
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair
from dpo_dist.errors import DataError, portable
from dpo_dist.reference.pair_key import KEY_BYTES, pair_key

CHUNK_ROWS = 256
CHUNK_BYTES = 4 << 20  # of text, so that long rows come in small chunks
CHUNKS_AHEAD = 4  # a process, so that none waits for the writer
TOKENIZER_MODULE = "transformers.models.auto.tokenization_auto"  # seconds to import: done once


Outcome = tuple[Pair | NoPair | BadRow, float | None]  # and the score margin


@dataclass(frozen=True)
class Chunk:
    """Some rows of a source; those of a stream travel with it, since only one process reads it."""

    source: int
    positions: list[int]
    streamed: list[Row] | None = None

    def first(self, count: int) -> "Chunk":
        """Its first rows."""
        streamed = None if self.streamed is None else self.streamed[:count]
        return replace(self, positions=self.positions[:count], streamed=streamed)


@dataclass(frozen=True)
class TokenizeJob:
    """Everything a process needs; travels to it once."""

    model_dir: Path
    template: str | None
    trust_remote_code: bool
    settings: DataSection
    sources: tuple[Source, ...]

    def load_tokenizer(self) -> PairTokenizer:
        """The tokenizer with the job's template."""
        tokenizer = load_tokenizer(self.model_dir, self.template, self.trust_remote_code)
        return PairTokenizer(tokenizer, self.settings)


@dataclass(frozen=True)
class ChunkTokenizer:
    """A job in a process that has the tokenizer loaded."""

    job: TokenizeJob
    tokenizer: PairTokenizer

    def read(self, chunk: Chunk) -> list[tuple[int, Outcome]]:
        """What the rows of a chunk make, in order, each with the position of its row."""
        source = self.job.sources[chunk.source]
        if chunk.streamed is not None:
            rows = iter(chunk.streamed)
        else:
            assert not isinstance(source.rows, StreamRows), "a stream is read by one process only"
            rows = source.rows.read(chunk.positions)
        numbered = zip(chunk.positions, rows, strict=True)
        return [(position, made) for position, row in numbered for made in _read_row(row, source)]

    def tokenize(self, chunk: Chunk) -> pa.RecordBatch:
        """The batch of a chunk: a row for every pair, and for every row read that makes none."""
        read = self.read(chunk)
        pairs = [pair for _, (pair, _) in read if isinstance(pair, Pair)]
        encoded = iter(self.tokenizer.encode(pairs))
        rows: list[dict[str, object]] = []
        for position, (pair, margin) in read:
            row = _outcome(pair, next(encoded)) if isinstance(pair, Pair) else _without_pair(pair)
            held_out = self._is_held_out(pair, chunk.source)
            row.update(
                source=chunk.source, position=position, held_out=held_out, score_margin=margin
            )
            rows.append(row)
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    def _is_held_out(self, pair: Pair | NoPair | BadRow, source: int) -> bool:
        if self.job.sources[source].split == "eval":
            return True
        fraction, seed = self.job.settings.eval_fraction, self.job.settings.eval_seed
        if not isinstance(pair, Pair) or not fraction:
            return False
        return is_held_out(pair.prompt_words, fraction, seed)


def make_chunks(sources: Sequence[Source]) -> Iterator[Chunk]:
    """Cuts all taken rows into chunks of at most CHUNK_ROWS rows and about CHUNK_BYTES bytes."""
    for index, source in enumerate(sources):
        if isinstance(source.rows, StreamRows):
            yield from _stream_chunks(index, source.rows, source.weight)
            continue
        positions: list[int] = []
        size = 0
        for position in source.positions().tolist():
            positions.append(position)
            if isinstance(source.rows, JsonRows | JoinedRows):
                size += source.rows.num_bytes(position)
            if len(positions) == CHUNK_ROWS or size >= CHUNK_BYTES:
                yield Chunk(index, positions)
                positions, size = [], 0
        if positions:
            yield Chunk(index, positions)


def _stream_chunks(index: int, stream: StreamRows, weight: float) -> Iterator[Chunk]:
    numbered = (
        (position, row) for position, row in enumerate(stream) if count_copies(position, weight)
    )
    while taken := list(itertools.islice(numbered, CHUNK_ROWS)):
        yield Chunk(index, [position for position, _ in taken], [row for _, row in taken])


def tokenize_chunks(
    job: TokenizeJob, tokenizer: PairTokenizer, chunks: Iterable[Chunk], num_workers: int
) -> Iterator[pa.RecordBatch]:
    """Yields the batches of the chunks in order, from `num_workers` processes.

    One worker is this process with `tokenizer`; others load their own.
    Raises the first DataError in row order, and DataError when a process was killed.
    """
    if num_workers == 1:
        yield from map(ChunkTokenizer(job, tokenizer).tokenize, chunks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, TOKENIZER_MODULE])
    with ProcessPoolExecutor(num_workers, context, _start_process, (job,)) as pool:
        pending: deque[Future[pa.RecordBatch]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_tokenize_in_process, chunk))
                if len(pending) > CHUNKS_AHEAD * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a tokenizing process was killed",
                f"{num_workers} processes to the end",
                "If memory ran out, lower data.num_workers.",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_chunk_tokenizer: ChunkTokenizer  # of this process, set once when it starts


def _start_process(job: TokenizeJob) -> None:
    global _chunk_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _chunk_tokenizer = ChunkTokenizer(job, job.load_tokenizer())


def _leave_with_parent() -> None:
    """A killed parent closes nothing: its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _tokenize_in_process(chunk: Chunk) -> pa.RecordBatch:
    try:
        return _chunk_tokenizer.tokenize(chunk)
    except Exception as error:
        raise portable(error) from None  # one that does not pickle would break the pool


def _dropped(reason: str, detail: str | None = None) -> dict[str, object]:
    nothing = bytes(KEY_BYTES)
    return {
        "prompt_ids": [], "chosen_ids": [], "rejected_ids": [],
        "reason": CODES[reason], "notes": 0, "detail": detail,
        "pair_key": nothing, "swapped_key": nothing, "prompt_key": nothing,
    }  # fmt: skip


def _without_pair(reason: NoPair | BadRow) -> dict[str, object]:
    if isinstance(reason, BadRow):
        return _dropped(BAD_ROW, str(reason))
    return _dropped(reason)


def _read_row(row: Row, source: Source) -> list[Outcome]:
    """What a row makes: a pair or, of several answers, as many as the source chooses."""
    try:
        row = rename_columns(row.sound(), source.columns)
        rows = pair_rows(row, source.pairs) if source.row_format == "ranked" else [row]
    except RowError as error:
        return [(BadRow.of(error, row.origin), None)]
    made = [_read_pair(one, source) for one in rows]
    bad = [outcome for outcome in made if isinstance(outcome[0], BadRow)]
    return bad[:1] or made or [(NO_PREFERENCE, None)]


def _read_pair(row: Row, source: Source) -> Outcome:
    least = source.min_score_margin
    try:
        pair = read_pair(row, source.row_format, source.name)
        if isinstance(pair, str):
            return pair, None
        margin = score_margin(row, required=least is not None)
    except RowError as error:
        return BadRow.of(error, row.origin), None
    # 7.3 - 7.2 is 0.0999..., which nobody means to be below 0.1
    is_low = least is not None and margin is not None and margin < least - 1e-9
    return (LOW_MARGIN if is_low else pair), margin


def _outcome(pair: Pair, encoded: TokenPair | TemplateRefusal) -> dict[str, object]:
    if isinstance(encoded, TemplateRefusal):
        return _dropped(TEMPLATE, f"{pair.origin}: {encoded}")
    prompt, chosen, rejected = encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids
    is_empty = pair.has_empty_part or not (prompt and chosen and rejected)
    lost = None if encoded.lost is None else f"{pair.origin}: {encoded.lost}"
    return {
        "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected,
        "reason": CODES[LOST_TEXT] if lost else CODES[EMPTY] if is_empty else KEPT,
        "notes": encoded.notes, "detail": lost,
        "pair_key": pair_key(prompt, chosen, rejected),
        "swapped_key": pair_key(prompt, rejected, chosen),
        "prompt_key": pair_key(prompt, [], []),
    }  # fmt: skip
