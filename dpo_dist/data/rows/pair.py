"""A preference as its row states it, before a template and a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.data.rows.messages import SYSTEM_ROLES, Conversation, Message, is_blank, text_of


@dataclass(frozen=True)
class Pair:
    """A preference: either three texts, or a conversation and two ways in which it goes on.

    Such an answer begins with an assistant's message. What others say between its messages, a tool
    most often, is read and not scored.
    """

    prompt: str | Conversation
    chosen: str | Conversation
    rejected: str | Conversation
    source: str
    origin: str
    tools: list[Any] | None = None
    continues_turn: bool = False  # the prompt ends in the beginning of the answer's turn
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def has_empty_part(self) -> bool:
        """Whether an answer is blank, or the prompt is but for a system message."""
        for answer in (self.chosen, self.rejected):
            said = [answer] if isinstance(answer, str) else assistant_turns(answer)
            if all(map(is_blank, said)):
                return True
        if isinstance(self.prompt, str):
            return is_blank(self.prompt)
        return all(is_blank(m) for m in self.prompt if m["role"] not in SYSTEM_ROLES)

    @property
    def prompt_words(self) -> str:
        """What the prompt says, in small letters: no markup, no spacing and no system message."""
        turns = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        said = [t for t in turns if isinstance(t, str) or t["role"] not in SYSTEM_ROLES]
        return " ".join(" ".join(map(text_of, said)).casefold().split())

    @property
    def answer_repeats_prompt(self) -> bool:
        """Whether an answer is the prompt (of a conversation: its last turn) word for word."""
        last = text_of(self.prompt if isinstance(self.prompt, str) else self.prompt[-1])
        return bool(last) and [last] in (_texts(self.chosen), _texts(self.rejected))

    @property
    def has_several_turns(self) -> bool:
        """Whether an answer is more than one message."""
        answers = (self.chosen, self.rejected)
        return any(not isinstance(answer, str) and len(answer) > 1 for answer in answers)

    def texts(self) -> list[str]:
        """All texts of the row's own, without what a template adds."""
        return [text for part in (self.prompt, self.chosen, self.rejected) for text in _texts(part)]


def assistant_turns(answer: Conversation) -> list[Message]:
    """The messages of an answer that are scored."""
    return [turn for turn in answer if turn["role"] == "assistant"]


def _texts(part: str | Conversation) -> list[str]:
    return [part] if isinstance(part, str) else [text_of(turn) for turn in part]
