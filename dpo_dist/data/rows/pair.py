"""A preference as its row states it, before a template and a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.data.rows.messages import SYSTEM_ROLES, Conversation, Message, is_blank, text_of


@dataclass(frozen=True)
class Pair:
    """A preference: either three texts, or a conversation and two last assistant messages."""

    prompt: str | Conversation
    chosen: str | Message
    rejected: str | Message
    source: str
    origin: str
    tools: list[Any] | None = None
    cut_to_shared: bool = False
    continues_turn: bool = False  # the prompt ends in the beginning of the answer's turn
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def has_empty_part(self) -> bool:
        """Whether an answer is blank, or the prompt is but for a system message."""
        if is_blank(self.chosen) or is_blank(self.rejected):
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
        return bool(last) and last in (text_of(self.chosen), text_of(self.rejected))

    def texts(self) -> list[str]:
        """All texts of the row's own, without what a template adds."""
        prompt = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [text_of(part) for part in (*prompt, self.chosen, self.rejected)]
