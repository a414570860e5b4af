"""A pair or a prompt rendered with a tokenizer's chat template.

Templates differ in the roles they know and in how they want a tool call; a conversation is given
to each in a spelling that it takes.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.rows.messages import (
    ROLES,
    SYSTEM_ROLES,
    Conversation,
    Message,
    continued,
    message,
)
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.tokens.templates import BUILTIN_TEMPLATES
from dpo_dist.data.tokens.trajectory import RewrittenTurnsError, Span, context_spans
from dpo_dist.errors import DataError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase


class TemplateRefusal(Exception):
    """A chat template does not take a conversation; the message is the template's own."""


@dataclass(frozen=True)
class RenderedPair:
    """The texts that are tokenized: the prompt, and the prompt with each answer.

    Of an answer of several turns the spans are read and not scored.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_context: list[Span] = field(default_factory=list[Span])
    rejected_context: list[Span] = field(default_factory=list[Span])

    @property
    def answers(self) -> tuple[tuple[str, list[Span]], tuple[str, list[Span]]]:
        """Chosen and rejected, each with its spans."""
        return (self.chosen, self.chosen_context), (self.rejected, self.rejected_context)

    @property
    def begin_with_prompt(self) -> bool:
        """Whether both longer texts begin with the prompt's; not every template does that."""
        return self.chosen.startswith(self.prompt) and self.rejected.startswith(self.prompt)


def render_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, settings: DataSection
) -> RenderedPair:
    """Renders a pair; texts are joined as they are, conversations go through the template.

    The generation prompt is part of the prompt. A text answer ends in EOS, as in TRL; where a
    conversation ends in EOS is the template's decision. Variables of the template come
    from the row, else from `settings`. Raises TemplateRefusal, and DataError for a conversation
    when the tokenizer has no template.
    """
    if isinstance(pair.prompt, str):
        eos = str(tokenizer.eos_token or "")
        chosen, rejected = str(pair.chosen), str(pair.rejected)
        return RenderedPair(
            pair.prompt,
            pair.prompt + chosen.removesuffix(eos) + eos,
            pair.prompt + rejected.removesuffix(eos) + eos,
        )
    assert isinstance(pair.chosen, list) and isinstance(pair.rejected, list), pair
    if not tokenizer.chat_template:
        raise DataError(
            f"{pair.origin} is a conversation, and the tokenizer has no chat template",
            "a chat template",
            f"Set data.chat_template to {', '.join(BUILTIN_TEMPLATES)} or a Jinja file.",
        )
    prompt = with_system_message(pair.prompt, settings.system_message)
    kwargs = {**settings.chat_template_kwargs, **pair.template_kwargs, "tools": pair.tools}
    begun = prompt[-1] if pair.continues_turn else None
    before = prompt[:-1] if begun else prompt
    answers = [
        [continued(begun, answer[0]), *answer[1:]] if begun else answer
        for answer in (pair.chosen, pair.rejected)
    ]
    chosen, rejected = (_render(tokenizer, [*before, *answer], kwargs) for answer in answers)
    end: dict[str, Any] = {"continue_final_message" if begun else "add_generation_prompt": True}

    def render(turns: Conversation, waits: bool) -> str:
        return _render(tokenizer, turns, {**kwargs, "add_generation_prompt": waits})

    try:
        contexts = [context_spans(render, before, a) if len(a) > 1 else [] for a in answers]
    except RewrittenTurnsError:
        raise TemplateRefusal("it renders a turn of an answer otherwise than alone") from None
    return RenderedPair(_render(tokenizer, prompt, kwargs | end), chosen, rejected, *contexts)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, settings: DataSection
) -> str:
    """A conversation that waits for its next answer, as `render_pair` renders a prompt.

    Raises TemplateRefusal.
    """
    prompt = with_system_message(conversation, settings.system_message)
    return _render(
        tokenizer, prompt, {**settings.chat_template_kwargs, "add_generation_prompt": True}
    )


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template writes before an answer, with the user turn before it; "" without one."""
    if not tokenizer.chat_template:
        return ""
    try:
        return _render(tokenizer, [message("user", "?")], {"add_generation_prompt": True})
    except TemplateRefusal:
        return ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a template writes behind an answer; None without one."""
    if not tokenizer.chat_template:
        return None
    try:
        turns = [message("user", "?"), message("assistant", "wxyzzy")]
        behind = _render(tokenizer, turns, {}).rpartition("wxyzzy")[2]
    except TemplateRefusal:
        return None
    added = tokenizer.added_tokens_decoder.items()
    special = {token_id for token_id, token in added if token.special} | set(
        tokenizer.all_special_ids
    )
    ids = tokenizer.encode(behind, add_special_tokens=False)
    return next((token_id for token_id in ids if token_id in special), None)


def with_system_message(prompt: Conversation, system_message: str | None) -> Conversation:
    """The prompt, after the default system message unless it has one."""
    if not system_message or (prompt and prompt[0]["role"] in SYSTEM_ROLES):
        return prompt
    return [message("system", system_message), *prompt]


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, kwargs: Mapping[str, Any]
) -> str:
    """The text of a conversation, in the spelling of roles and calls that the template takes."""
    template = str(tokenizer.chat_template)
    turns = [
        {**turn, "role": "system"}
        if turn["role"] == "developer" and "developer" not in template
        else turn
        for turn in conversation
    ]
    for turn in turns:
        if turn["role"] not in (*ROLES, *_quoted(template)):
            raise TemplateRefusal(f"it does not know the role {turn['role']!r}")
    first: TemplateRefusal | None = None
    for spelled in _spellings(turns):
        try:
            text = str(tokenizer.apply_chat_template(spelled, tokenize=False, **kwargs))
            text.encode()  # a role or a tool may hold half a character, which has no tokens
            return text
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            # TypeError: a template that adds a null content to a string
            first = first or TemplateRefusal(str(error) or repr(error))
    assert first is not None
    raise first from None


def _quoted(template: str) -> list[str]:
    """Words that stand in quotes in a template; the roles it looks for are among them."""
    return re.findall(r"[\"'](\w+)[\"']", template)


def _spellings(turns: Conversation) -> Iterator[Conversation]:
    """The same turns as different templates want their tool calls: arguments as an object or as
    JSON text, and text that is left out or empty."""
    yield turns
    if any("tool_calls" in turn for turn in turns):
        with_text = [{"content": "", **turn} for turn in turns]
        yield with_text
        yield [
            {**turn, "tool_calls": [_with_json(call) for call in turn["tool_calls"]]}
            if "tool_calls" in turn
            else turn
            for turn in with_text
        ]


def _with_json(call: Mapping[str, Any]) -> Message:
    """A tool call whose arguments are JSON text."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
