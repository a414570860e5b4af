"""A pair as text, with the tokens that are scored marked.

Every scored token stands in square brackets, so that the marks are there without color too; a
line break inside a token is written as the sign for it. What is only read has no brackets.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT_CHARACTERS = 1200
MAX_ANSWER_TOKENS = 200
LINE_BREAK = "\u21b5"  # a return arrow


def preview_pair(
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    prompt_ids: Sequence[int],
    chosen_ids: Sequence[int],
    rejected_ids: Sequence[int],
) -> Text:
    """The prompt as text and both answers as marked tokens; long ones lose their middle."""
    text = Text(f"{origin}\n", style="bold")
    text.append(f"prompt, {len(prompt_ids)} tokens\n", style="underline")
    text.append(_shorten(str(tokenizer.decode(list(prompt_ids)))) + "\n", style="dim")
    for name, ids, color in (("chosen", chosen_ids, "green"), ("rejected", rejected_ids, "red")):
        scored = sum(token >= 0 for token in ids)
        read = f", {len(ids) - scored} read" if scored < len(ids) else ""
        text.append(f"{name}, {scored} scored tokens{read}\n", style="underline")
        for is_scored, run in itertools.groupby(ids, lambda token: token >= 0):
            if is_scored:
                text.append(marked_tokens(tokenizer, list(run)), style=color)
            else:
                said = str(tokenizer.decode([~token for token in run]))
                text.append(_shorten(said), style="dim")
        text.append("\n")
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
