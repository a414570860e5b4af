"""Pairs as text: the tokens that are scored, what is only read, and what the template left out.

Every scored token stands in square brackets, and what is lost in braces, so that the marks are
there without color too; a line break inside a token is written as the sign for it. What is only
read has neither.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from dpo_dist.data.drop_reasons import BAD_ROW, CODES, DROP_REASONS, KEPT, LOST_TEXT
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.screening.bad_rows import BadRow
from dpo_dist.data.screening.tokenizer_pool import Chunk, ChunkTokenizer
from dpo_dist.data.tokens.lost_text import Lost

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT_CHARACTERS = 1200
MAX_ANSWER_TOKENS = 200
LINE_BREAK = "\u21b5"  # a return arrow
READ, LOST = "dim", "bold yellow"
LEGEND = Text.assemble(
    ("[scored]", "green"), " [token][s]; ", ("read", READ), " and not scored; ",
    ("{lost}", LOST), ": in the row, and in no token\n",
)  # fmt: skip


def preview_rows(chunks: ChunkTokenizer, chunk: Chunk, max_length: int | None) -> Iterator[Text]:
    """Each row of a chunk as a pair, or why it is dropped; None does not truncate."""
    source = chunks.job.sources[chunk.source]
    rows = chunks.tokenize(chunk).to_pylist()
    for (_, (pair, _)), row in zip(chunks.read(chunk), rows, strict=True):
        origin = f"{source.name}, {source.row_format}, {source.rows.origin(row['position'])}"
        if row["reason"] not in (KEPT, CODES[LOST_TEXT]):
            reason = DROP_REASONS[row["reason"] - 1]
            bad = row["reason"] == CODES[BAD_ROW]
            why = BadRow.parse(row["detail"]).reason if bad else reason.meaning
            yield Text(f"{origin}\ndropped, {reason.name}: {why}\n")
            continue
        assert isinstance(pair, Pair)
        room = None if max_length is None else max(max_length - len(row["prompt_ids"]), 0)
        yield preview_pair(
            chunks.tokenizer.tokenizer,
            origin,
            row["prompt_ids"],
            row["chosen_ids"][:room],
            row["rejected_ids"][:room],
            chunks.tokenizer.lost(pair),
        )


def preview_pair(
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    prompt_ids: Sequence[int],
    chosen_ids: Sequence[int],
    rejected_ids: Sequence[int],
    lost: Sequence[Lost] = (),
) -> Text:
    """The prompt as text, both answers as marked tokens, and what is lost; long ones lose their
    middle."""
    text = Text(f"{origin}\n", style="bold")
    text.append(f"prompt, {len(prompt_ids)} tokens\n", style="underline")
    text.append(_shorten(str(tokenizer.decode(list(prompt_ids)))) + "\n", style=READ)
    for name, ids, color in (("chosen", chosen_ids, "green"), ("rejected", rejected_ids, "red")):
        scored = sum(token >= 0 for token in ids)
        read = f", {len(ids) - scored} read" if scored < len(ids) else ""
        text.append(f"{name}, {scored} scored tokens{read}\n", style="underline")
        for is_scored, run in itertools.groupby(ids, lambda token: token >= 0):
            if is_scored:
                text.append(marked_tokens(tokenizer, list(run)), style=color)
            else:
                said = str(tokenizer.decode([~token for token in run]))
                text.append(_shorten(said), style=READ)
        text.append("\n")
    if lost:
        text.append("lost, because the chat template leaves it out\n", style="underline")
    for where, parts in itertools.groupby(lost, lambda part: part.where):
        text.append(f"{where}: ", style=READ)
        text.append(" ".join(f"{{{_shorten(part.text)}}}" for part in parts) + "\n", style=LOST)
    return text


def marked_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Every token in square brackets; tokens that only together make a character share one."""
    half = MAX_ANSWER_TOKENS // 2
    if len(ids) > MAX_ANSWER_TOKENS:
        skipped = f" ... {len(ids) - 2 * half} tokens ... "
        first, last = marked_tokens(tokenizer, ids[:half]), marked_tokens(tokenizer, ids[-half:])
        return first + skipped + last
    pieces: list[str] = []
    pending: list[int] = []
    for position, token in enumerate(ids, start=1):
        pending.append(token)
        piece = str(tokenizer.decode(pending))
        # an unfinished character decodes to the replacement sign
        if not piece.endswith("\ufffd") or position == len(ids):
            pieces.append(f"[{piece}]".replace("\n", LINE_BREAK))
            if LINE_BREAK in pieces[-1]:
                pieces.append("\n")
            pending = []
    return "".join(pieces)


def _shorten(text: str) -> str:
    half = MAX_PROMPT_CHARACTERS // 2
    if len(text) <= MAX_PROMPT_CHARACTERS:
        return text
    skipped = len(text) - 2 * half
    return f"{text[:half]}\n... {skipped:,} characters ...\n{text[-half:]}"
