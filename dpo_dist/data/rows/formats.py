"""Row formats: what a row of a preference file means.

1. `detect_format` looks at the columns of a source's first row, once per source.
2. `read_pair` turns a row into a `Pair`: a prompt and two answers, as text or as messages.

In a conversation everything but the last assistant turn is the prompt. The few lines TRL has for
an implicit prompt are written here anew: importing trl doubles the start of this stage.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_dist.config.data_section import PreferenceFormat
from dpo_dist.data.drop_reasons import NO_SHARED_PROMPT, UNPAIRED
from dpo_dist.data.rows.messages import (
    SYSTEM_ROLES,
    Conversation,
    Message,
    is_blank,
    message,
    num_shared,
    read_messages,
    read_tools,
    text_of,
)
from dpo_dist.data.rows.row import Row, as_list, type_name
from dpo_dist.errors import DataError

COLUMNS = (
    "prompt", "chosen", "rejected", "system", "question", "response_j", "response_k", "tools",
    "chosen_score", "rejected_score", "completion", "label",
)  # fmt: skip
DIALOGUE_COLUMNS = ("conversations", "messages")  # LlamaFactory's and Axolotl's names of the prompt
LABELLED_COLUMNS = frozenset(("completion", "label"))
NoPair = Literal["no_shared_prompt", "unpaired"]  # the reason a row makes no pair
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\s*Human:")


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


def check_column_map(columns: Mapping[str, str], where: str) -> None:
    """Raises DataError when a column map names a column that no format knows."""
    for name in columns:
        if name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"Did you mean {close[0]}?" if close else "Write {our name: the file's name}."
            raise DataError(f"{where}.columns has {name!r}", f"one of {', '.join(COLUMNS)}", hint)


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our column names; raises DataError when a mapped column is missing."""
    if not columns:
        return row
    renamed = {ours: row.field(theirs) for ours, theirs in columns.items()}
    others = {name: value for name, value in row.fields.items() if name not in columns.values()}
    return Row({**others, **renamed}, row.origin)


def implied_columns(row: Row) -> dict[str, str]:
    """The column map of rows whose prompt is a dialogue under another trainer's name; else {}."""
    names = row.fields.keys()
    if {"chosen", "rejected"} <= names and "prompt" not in names:
        for name in DIALOGUE_COLUMNS:
            if isinstance(row.fields.get(name), list):
                return {"prompt": name}
    return {}


def detect_format(row: Row, where: str) -> PreferenceFormat:
    """The format of a source by the columns of its first row; `where` is its key in the config."""
    names = row.fields.keys()
    if {"question", "response_j", "response_k"} <= names:
        return "stack_exchange"
    if not {"chosen", "rejected"} <= names and names >= LABELLED_COLUMNS:
        raise DataError(
            f"{row.origin} has the columns {', '.join(names)}: one answer and a label, as for KTO",
            "two answers to a prompt, chosen and rejected",
            f"Set {where}.format=labelled to pair good and bad answers to the same prompt.",
        )
    if not {"chosen", "rejected"} <= names:
        raise DataError(
            f"{row.origin} has the columns {', '.join(names) or '(none)'}",
            "chosen and rejected, or question, response_j and response_k",
            f"Map the file's names, for example {where}.columns={{chosen: good, rejected: bad}}.",
        )
    prompt, chosen = row.fields.get("prompt"), row.field("chosen")
    if isinstance(prompt, list):
        return "conversational"
    if not isinstance(chosen, str):
        return "ultrafeedback" if isinstance(prompt, str) else "conversational"
    if "prompt" in names:
        return "standard"
    if "question" in names:
        return "orca"
    if "instruction" in names:
        return "alpaca"
    return "hh" if _HH_START.match(chosen) else "standard"


def read_pair(row: Row, row_format: PreferenceFormat, source: str) -> Pair | NoPair:
    """The pair of a row, or the reason to drop it; raises DataError at a field that is unusable."""
    if row.lacks_partner:
        return UNPAIRED
    match row_format:
        case "standard":
            return _text_pair(row, source)
        case "orca":
            system = [message("system", row.text("system"))] if row.fields.get("system") else []
            prompt = [*system, message("user", row.text("question"))]
            return _single_turn_pair(row, prompt, "chosen", "rejected", source)
        case "alpaca":
            return _single_turn_pair(row, _alpaca_prompt(row), "chosen", "rejected", source)
        case "stack_exchange":
            prompt = [message("user", row.text("question"))]
            return _single_turn_pair(row, prompt, "response_j", "response_k", source)
        case "hh":
            chosen, rejected = (_hh_dialogue(row, name) for name in ("chosen", "rejected"))
            return _last_turn_pair(row, chosen, rejected, source)
        case "ultrafeedback" | "conversational":
            chosen, rejected = _dialogues(row)
            return _last_turn_pair(row, chosen, rejected, source)
        case "auto" | "labelled":
            raise AssertionError("the format is settled before rows are read")


def _text_pair(row: Row, source: str) -> Pair:
    """Without a prompt column the prompt is what both texts begin with.

    It then ends before the last whitespace of the shared part, so that it holds whole words and
    an answer begins with the space that belongs to its first token.
    """
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if "prompt" in row.fields:
        return Pair(row.text("prompt"), chosen, rejected, source, row.origin)
    prompt = re.sub(r"\s*\w*$", "", os.path.commonprefix([chosen, rejected]))
    start = len(prompt)
    return Pair(prompt, chosen[start:], rejected[start:], source, row.origin)


def _alpaca_prompt(row: Row) -> Conversation:
    """The instruction and, on a line of its own, its input; system and turns before it if any."""
    turns = [message("system", row.text("system"))] if row.fields.get("system") else []
    for number, turn in enumerate(row.fields.get("history") or []):
        name = f"history[{number}]"
        parts = as_list(turn)
        if parts is None or len(parts) != 2:
            raise row.unusable(f"{name} is {type_name(turn)}", "a list of question and answer")
        turns.append(message("user", row.checked_text(name, parts[0])))
        turns.append(message("assistant", row.checked_text(name, parts[1])))
    asked = [row.text("instruction"), *([row.text("input")] if row.fields.get("input") else [])]
    return [*turns, message("user", "\n".join(asked))]


def _single_turn_pair(
    row: Row, prompt: Conversation, chosen: str, rejected: str, source: str
) -> Pair:
    better, worse = (message("assistant", row.text(name)) for name in (chosen, rejected))
    return Pair(prompt, better, worse, source, row.origin)


def _last_turn_pair(
    row: Row, chosen: Conversation, rejected: Conversation, source: str
) -> Pair | NoPair:
    """Splits two dialogues before their last assistant turn, or where they part.

    Dialogues that part earlier are cut to what they share and the two assistant turns that
    follow; when those are not assistant turns there is no common prompt to answer.
    """
    at_the_end = chosen[:-1] == rejected[:-1]
    turn = len(chosen) - 1 if at_the_end else num_shared(chosen, rejected)
    if not 0 < turn < min(len(chosen), len(rejected)):
        return NO_SHARED_PROMPT
    answers = chosen[turn], rejected[turn]
    if any(answer["role"] != "assistant" for answer in answers):
        return NO_SHARED_PROMPT
    return Pair(
        prompt=chosen[:turn],
        chosen=answers[0],
        rejected=answers[1],
        source=source,
        origin=row.origin,
        tools=read_tools(row),
        cut_to_shared=not at_the_end,
    )


def _hh_dialogue(row: Row, name: str) -> Conversation:
    """Messages of a text `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    text = row.text(name)
    before, *turns = _HH_TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        begins = text if len(text) <= 40 else text[:37] + "..."
        raise row.unusable(
            f"field {name!r} begins with {begins!r}", "a dialogue that begins with 'Human:'"
        )
    return [
        message("user" if role == "Human" else "assistant", content.strip())
        for role, content in zip(turns[0::2], turns[1::2], strict=True)
    ]


def _dialogues(row: Row) -> tuple[Conversation, Conversation]:
    """Both dialogues in full, whether the prompt stands in them, beside them, or both."""
    chosen, rejected = (read_messages(row, name) for name in ("chosen", "rejected"))
    prompt = row.fields.get("prompt")
    if prompt is None:
        return chosen, rejected
    if isinstance(prompt, str):
        opening = [message("user", row.text("prompt"))]
        # beside full dialogues this column only repeats a part of them, as in UltraFeedback
        repeated = any(turn["role"] == "user" for turn in chosen + rejected)
    else:
        opening = read_messages(row, "prompt")
        repeated = all(d[: len(opening)] == opening for d in (chosen, rejected))
    if repeated:
        return chosen, rejected
    return opening + chosen, opening + rejected
