"""What a row says and a chat template leaves out.

A template decides what of a conversation a model sees: many know no tool calls, some drop the
thoughts of earlier turns. What is lost in silence trains a model on another text than the row's,
so every text, thought, tool call and tool is looked for in the rendered text, in order.

| part | what has to be there |
| --- | --- |
| `content` | a message's text, without the space around it and without its thought |
| `thought` | an answer's `reasoning_content` or `thinking`, or what stands before `</think>` |
| `earlier_thought` | the same of the prompt's turns |
| `tool_calls` | the function's name, and names and values of its arguments |
| `tools` | the name of every tool that may be called |
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.data_section import DataSection, LosablePart
from dpo_dist.data.rows.messages import (
    SYSTEM_ROLES,
    THOUGHT_KEYS,
    Conversation,
    Message,
    text_of,
)
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import as_list, as_object
from dpo_dist.data.tokens.render import RenderedPair, with_system_message

_END_OF_THOUGHT = "</think>"
Part = tuple[LosablePart, str]


@dataclass(frozen=True)
class Lost:
    """A text of the row that is missing in the rendered one, and where it stands in the row."""

    part: LosablePart
    where: str
    text: str


def lost_text(pair: Pair, text: RenderedPair, settings: DataSection) -> str | None:
    """The first part of a pair that its texts leave out and that is not allowed to be left out.

    None: nothing is.
    """
    for lost in lost_parts(pair, text, settings):
        if lost.part not in settings.allow_lost:
            return lost.where
    return None


def lost_parts(pair: Pair, text: RenderedPair, settings: DataSection) -> Iterator[Lost]:
    """All that the texts of a pair leave out: of the prompt and chosen, then with rejected.

    Plain texts are never rendered, so they lose nothing.
    """
    if isinstance(pair.prompt, str):
        return
    prompt = with_system_message(pair.prompt, settings.system_message)
    for answer, rendered in ((pair.chosen, text.chosen), (pair.rejected, text.rejected)):
        assert isinstance(answer, list), pair
        yield from _lost_in([*prompt, *answer], pair.tools, rendered)


def is_prompt_scored(pair: Pair, text: RenderedPair, settings: DataSection) -> bool:
    """Whether words of the prompt stand behind what its own text and the longer ones begin with.

    A template that rewrites the prompt before an answer may do so in its turns, and not only in the
    header of the answer's.
    """
    if isinstance(pair.prompt, str):
        return False
    prompt = with_system_message(pair.prompt, settings.system_message)
    shared = os.path.commonprefix([text.prompt, text.chosen, text.rejected])
    missing, lost = (
        {part.text for part in _lost_in(prompt, None, rendered)}
        for rendered in (shared, text.chosen)
    )
    return bool(missing - lost)


def _lost_in(
    conversation: Conversation, tools: Sequence[Any] | None, rendered: str
) -> Iterator[Lost]:
    """The parts that are missing in the rendered text.

    The conversation's last message is an answer. A system message may stand anywhere, since some
    templates write it into a user turn.
    """
    for tool in tools or []:
        named = as_object(tool) or {}
        name = (as_object(named.get("function")) or named).get("name")
        if name and str(name) not in rendered:
            yield Lost("tools", f"tools: {name}", str(name))
    start = 0
    for index, turn in enumerate(conversation):
        is_answer = index == len(conversation) - 1
        where = "the answer" if is_answer else f"message {index + 1} ({turn['role']})"
        moves = turn["role"] in SYSTEM_ROLES
        end = start
        for part, text in _parts(turn, is_answer):
            found = _find(text, rendered, 0 if moves else start)
            if found is None:
                yield Lost(part, f"{part} of {where}", text.strip())
            elif not moves:
                end = max(end, found)
        start = end


def _parts(turn: Message, is_answer: bool) -> Iterator[Part]:
    thought: LosablePart = "thought" if is_answer else "earlier_thought"
    said = text_of(turn)
    before, mark, after = said.partition(_END_OF_THOUGHT)
    if mark and turn["role"] == "assistant":
        said = after
        yield thought, before.strip().removeprefix("<think>")
    for key in THOUGHT_KEYS:
        yield thought, str(turn.get(key) or "")
    yield "content", said
    for call in as_list(turn.get("tool_calls")) or []:
        for text in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
            yield "tool_calls", text


def _leaves(value: Any) -> Iterator[str]:
    """The names and values in arguments, as texts."""
    if (named := as_object(value)) is not None:
        for name, inner in named.items():
            yield name
            yield from _leaves(inner)
    elif (items := as_list(value)) is not None:
        for item in items:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)  # true, false and null have other names in other languages


def _find(text: str, rendered: str, start: int) -> int | None:
    """Where a text ends behind `start`, as it is or as JSON spells it; None: it is missing."""
    text = text.strip()
    if not text:
        return start
    for spelled in dict.fromkeys((text, *_as_json(text))):
        if (at := rendered.find(spelled, start)) >= 0:
            return at + len(spelled)
    return None


def _as_json(text: str) -> Iterator[str]:
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]
