"""Tokenising rows in parallel: chunks of rows in, Arrow record batches of token ids out, in order.

The processes come from a fork server that has loaded the tokenizer library: no thread of the
parent is copied in the middle of something, and a process that is killed is noticed.
`datasets.map` was not taken because it wants all rows in one typed table first, where messages
with different keys do not fit, and loses the `file:line` of an error.
"""

# pyright: basic
# (pyarrow has no types)

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dpo_dist.data.columns import SCHEMA
from dpo_dist.data.formats import Pair, read_pair, rename_columns
from dpo_dist.data.json_rows import JsonRows
from dpo_dist.data.keys import KEY_BYTES, pair_key
from dpo_dist.data.reasons import CODES, EMPTY, KEPT, NO_SHARED_PROMPT, TEMPLATE
from dpo_dist.data.sources import Source
from dpo_dist.data.templates import TemplateRefusal, load_tokenizer
from dpo_dist.data.tokenize import PairTokenizer, TokenPair
from dpo_dist.errors import DataError

CHUNK_ROWS = 256
CHUNK_BYTES = 4 << 20  # of text, so that long rows come in small chunks
CHUNKS_AHEAD = 4  # a process, so that none waits for the writer
TOKENIZER_MODULE = "transformers.models.auto.tokenization_auto"  # seconds to import: done once


@dataclass(frozen=True)
class Chunk:
    """Rows start..stop of the taken positions of a source."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class TokenizeJob:
    """Everything a process needs; travels to it once."""

    model_dir: Path
    template: str | None
    trust_remote_code: bool
    system_message: str | None
    sources: tuple[Source, ...]

    def load_tokenizer(self) -> PairTokenizer:
        """The tokenizer with the job's template and system message."""
        tokenizer = load_tokenizer(self.model_dir, self.template, self.trust_remote_code)
        return PairTokenizer(tokenizer, self.system_message)


@dataclass(frozen=True)
class ChunkTokenizer:
    """A job in a process that has the tokenizer loaded."""

    job: TokenizeJob
    tokenizer: PairTokenizer

    def read(self, chunk: Chunk) -> list[Pair | str]:
        """The pairs of a chunk, or the name of the reason to drop a row."""
        source = self.job.sources[chunk.source]
        rows = source.rows.read(source.positions[chunk.start : chunk.stop].tolist())
        return [
            read_pair(rename_columns(row, source.columns), source.row_format, source.name)
            for row in rows
        ]

    def tokenize(self, chunk: Chunk) -> pa.RecordBatch:
        """The batch of a chunk: one row for every row read, dropped or not."""
        read = self.read(chunk)
        encoded = iter(self.tokenizer.encode([pair for pair in read if isinstance(pair, Pair)]))
        positions = self.job.sources[chunk.source].positions[chunk.start : chunk.stop]
        rows = [
            _dropped(NO_SHARED_PROMPT) if isinstance(pair, str) else _outcome(pair, next(encoded))
            for pair in read
        ]
        for row, position in zip(rows, positions.tolist(), strict=True):
            row.update(source=chunk.source, position=position)
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def make_chunks(sources: Sequence[Source]) -> list[Chunk]:
    """Cuts all taken rows into chunks of at most CHUNK_ROWS rows and about CHUNK_BYTES bytes."""
    chunks: list[Chunk] = []
    for index, source in enumerate(sources):
        start, size = 0, 0
        for stop, position in enumerate(source.positions.tolist(), start=1):
            if isinstance(source.rows, JsonRows):
                size += int(source.rows.stops[position] - source.rows.starts[position])
            if stop - start == CHUNK_ROWS or size >= CHUNK_BYTES or stop == len(source.positions):
                chunks.append(Chunk(index, start, stop))
                start, size = stop, 0
    return chunks


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
                "a tokenising process was killed",
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
    return _chunk_tokenizer.tokenize(chunk)


def _dropped(reason: str, detail: str | None = None) -> dict[str, object]:
    nothing = bytes(KEY_BYTES)
    return {
        "prompt_ids": [], "chosen_ids": [], "rejected_ids": [],
        "reason": CODES[reason], "notes": 0, "detail": detail,
        "pair_key": nothing, "swapped_key": nothing, "prompt_key": nothing,
    }  # fmt: skip


def _outcome(pair: Pair, encoded: TokenPair | TemplateRefusal) -> dict[str, object]:
    if isinstance(encoded, TemplateRefusal):
        return _dropped(TEMPLATE, f"{pair.origin}: {encoded}")
    prompt, chosen, rejected = encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids
    # a template may drop a text that is not empty
    is_empty = pair.has_empty_part or not (prompt and chosen and rejected)
    return {
        "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected,
        "reason": CODES[EMPTY] if is_empty else KEPT,
        "notes": encoded.notes, "detail": None,
        "pair_key": pair_key(prompt, chosen, rejected),
        "swapped_key": pair_key(prompt, rejected, chosen),
        "prompt_key": pair_key(prompt, [], []),
    }  # fmt: skip
