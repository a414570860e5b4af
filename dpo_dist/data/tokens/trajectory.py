"""Where the turns of an answer stand in its rendered text, and which of them are scored.

An agent's answer is a trajectory: a tool call, the tool's result, the next call or the last word.
The assistant's turns are what the model would write. What comes between, the tool's or a user's
words and the headers of turns, it would be given.
"""

import os
import re
from collections.abc import Callable, Iterator

from dpo_dist.data.rows.messages import Conversation, Message, message, text_of

Span = tuple[int, int]  # first character, character behind the last
Render = Callable[[Conversation, bool], str]  # with or without the generation prompt at the end
_WORD = "wxyzzy"  # no template writes it
_MARK = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])\n*")


class RewrittenTurnsError(Exception):
    """A template renders the turns of an answer otherwise once others follow."""


def context_spans(render: Render, prompt: Conversation, answer: Conversation) -> list[Span]:
    """The parts of the rendered prompt and answer, behind the prompt, that are not scored.

    A turn begins behind what the template writes before it is generated. It ends where the text
    without later turns ends. Where a template drops the thoughts of earlier turns, or ends the last
    turn otherwise, it ends behind the next mark of an end. Raises RewrittenTurnsError when a turn
    is not found.
    """
    text = render([*prompt, *answer], False)
    ours = [at for at, turn in enumerate(answer) if turn["role"] == "assistant"]
    starts = [_num_shared(text, render([*prompt, *answer[:at]], True)) for at in ours]
    ends: list[int] = []
    for at, start, following in zip(ours, starts, [*starts[1:], len(text)], strict=True):
        last = at + 1 == len(answer)
        before = [*prompt, *answer[:at]]
        end = len(text) if last else _end(render, text[:following], start, before, answer[at])
        if end is None or not start < end <= following:
            raise RewrittenTurnsError
        ends.append(end)
    spans = zip(ends, [*starts[1:], len(text)], strict=True)
    return [span for span in spans if span[0] < span[1]]


def _end(render: Render, text: str, start: int, before: Conversation, turn: Message) -> int | None:
    """Where the turn that begins at `start` ends, in a text up to the next one."""
    alone = render([*before, turn], False)
    if text.startswith(alone):
        return len(alone)
    mark = render([*before, message("assistant", _WORD)], False).rpartition(_WORD)[2]
    if mark and (at := text.find(mark, start)) >= 0:
        return at + len(mark)
    # the last turn of a dialogue ends otherwise, as with <|return|>
    said = text_of(turn).strip()
    at = text.find(said, start) if said else -1
    found = None if at < 0 else _MARK.match(text, at + len(said))
    return found and found.end()


def _num_shared(text: str, other: str) -> int:
    return len(os.path.commonprefix([text, other]))


def pieces(text: str, start: int, spans: list[Span]) -> Iterator[tuple[str, bool]]:
    """The text from `start` on, cut at the spans, and whether each piece is scored."""
    for first, last in spans:
        if start < first:
            yield text[start:first], True
        yield text[first:last], False
        start = last
    if start < len(text):
        yield text[start:], True
