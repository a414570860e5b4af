"""Row formats: what a row of a preference file means.

1. `detect_format` looks at the columns of a source's first row, once per source.
2. `read_pair` turns a row into a `Pair`: a prompt and two answers, as text or as messages.

In a conversation everything but the last assistant turn is the prompt. The few lines TRL has for
an implicit prompt are written here anew: importing trl doubles the start of this stage.
"""

import difflib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_dist.config import PreferenceFormat
from dpo_dist.data.reasons import NO_SHARED_PROMPT
from dpo_dist.errors import DataError

Message = dict[str, Any]  # role, content and, where there are, the keys of MESSAGE_KEYS
Conversation = list[Message]

COLUMNS = (
    "prompt", "chosen", "rejected", "system", "question", "response_j", "response_k", "tools",
)  # fmt: skip
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\s*Human:")


@dataclass(frozen=True)
class Row:
    """One row of a source and where it lies, `file:line`."""

    fields: Mapping[str, Any]
    origin: str


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


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our column names; raises DataError when a mapped column is missing."""
    if not columns:
        return row
    fields = {name: value for name, value in row.fields.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        fields[ours] = _field(row, theirs)
    return Row(fields, row.origin)


def check_column_map(columns: Mapping[str, str], where: str) -> None:
    """Raises DataError when a column map names a column that no format knows."""
    for name in columns:
        if name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"Did you mean {close[0]}?" if close else "Write {our name: the file's name}."
            raise DataError(
                f"{where}.columns maps to {name!r}", f"one of {', '.join(COLUMNS)}", hint
            )


def detect_format(row: Row, where: str) -> PreferenceFormat:
    """The format of a source by the columns of its first row; `where` is its key in the config."""
    names = row.fields.keys()
    if {"question", "response_j", "response_k"} <= names:
        return "stack_exchange"
    if not {"chosen", "rejected"} <= names:
        raise DataError(
            f"{row.origin} has the columns {', '.join(names) or '(none)'}",
            "chosen and rejected, or question, response_j and response_k",
            f"Map the file's names, for example {where}.columns={{chosen: good, rejected: bad}}.",
        )
    prompt, chosen = row.fields.get("prompt"), _field(row, "chosen")
    if isinstance(prompt, list):
        return "conversational"
    if not isinstance(chosen, str):
        return "ultrafeedback" if isinstance(prompt, str) else "conversational"
    if "prompt" in names:
        return "standard"
    if "question" in names:
        return "orca"
    return "hh" if _HH_START.match(chosen) else "standard"


def read_pair(
    row: Row, row_format: PreferenceFormat, source: str
) -> Pair | Literal["no_shared_prompt"]:
    """The pair of a row, or the reason to drop it; raises DataError at a field that is unusable."""
    match row_format:
        case "standard":
            prompt, chosen, rejected = _texts(row)
            return Pair(prompt, chosen, rejected, source, row.origin)
        case "orca":
            system = row.fields.get("system")
            opening = [_message("system", _text(row, "system"))] if system else []
            question = _message("user", _text(row, "question"))
            return _single_turn(row, [*opening, question], "chosen", "rejected", source)
        case "stack_exchange":
            question = _message("user", _text(row, "question"))
            return _single_turn(row, [question], "response_j", "response_k", source)
        case "hh":
            chosen, rejected = (_hh_dialogue(row, name) for name in ("chosen", "rejected"))
            return _last_turn_pair(row, chosen, rejected, source)
        case "ultrafeedback" | "conversational":
            chosen, rejected = _dialogues(row)
            return _last_turn_pair(row, chosen, rejected, source)
        case "auto":
            raise AssertionError("the format is settled before rows are read")


def is_blank(answer: str | Message) -> bool:
    """Whether an answer or a message says nothing: no text and no tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not str(answer.get("content") or "").strip() and not answer.get("tool_calls")


def has_empty_part(pair: Pair) -> bool:
    """Whether an answer is blank, or the prompt has nothing beside a system message."""
    if is_blank(pair.chosen) or is_blank(pair.rejected):
        return True
    if isinstance(pair.prompt, str):
        return not pair.prompt.strip()
    return all(is_blank(m) for m in pair.prompt if m["role"] not in ("system", "developer"))


def answer_repeats_prompt(pair: Pair) -> bool:
    """Whether an answer is the prompt (of a conversation: its last turn) word for word."""
    if isinstance(pair.prompt, str):
        return pair.prompt in (pair.chosen, pair.rejected)
    if not pair.prompt or is_blank(pair.prompt[-1]):
        return False
    last = pair.prompt[-1].get("content")
    return any(isinstance(a, dict) and a.get("content") == last for a in (pair.chosen, pair.rejected))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _single_turn(
    row: Row, prompt: Conversation, chosen: str, rejected: str, source: str
) -> Pair:
    return Pair(
        prompt,
        _message("assistant", _text(row, chosen)),
        _message("assistant", _text(row, rejected)),
        source,
        row.origin,
    )


def _last_turn_pair(
    row: Row, chosen: Conversation, rejected: Conversation, source: str
) -> Pair | Literal["no_shared_prompt"]:
    """Splits two dialogues before their last assistant turn, or where they part.

    Dialogues that part earlier are cut to what they share and the two assistant turns that
    follow; when those are not assistant turns there is no common prompt to answer.
    """
    at_the_end = chosen[:-1] == rejected[:-1]
    turn = len(chosen) - 1 if at_the_end else _num_shared(chosen, rejected)
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
        tools=_tools(row),
        cut_to_shared=not at_the_end,
    )


def _num_shared(chosen: Conversation, rejected: Conversation) -> int:
    """How many messages two dialogues have in common from the start."""
    pairs = zip(chosen, rejected, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _texts(row: Row) -> tuple[str, str, str]:
    """Prompt and two answers; without a prompt column the prompt is what the texts share.

    The prompt ends before the last whitespace of the shared part, so that it holds whole words
    and an answer begins with the space that belongs to its first token.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if "prompt" in row.fields:
        return _text(row, "prompt"), chosen, rejected
    prompt = re.sub(r"\s*\w*$", "", os.path.commonprefix([chosen, rejected]))
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _hh_dialogue(row: Row, name: str) -> Conversation:
    """Messages of a text `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    text = _text(row, name)
    before, *turns = _HH_TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        raise DataError(
            f"{row.origin}: field {name!r} begins with {_shorten(text)}",
            "a dialogue that begins with 'Human:' (format hh)",
            "Name the source's format in the config.",
        )
    roles, contents = turns[0::2], turns[1::2]
    return [
        _message("user" if role == "Human" else "assistant", content.strip())
        for role, content in zip(roles, contents, strict=True)
    ]


def _dialogues(row: Row) -> tuple[Conversation, Conversation]:
    """Both dialogues in full, whether the prompt stands in them, beside them, or both."""
    chosen, rejected = (_messages(row, name) for name in ("chosen", "rejected"))
    prompt = row.fields.get("prompt")
    if prompt is None:
        return chosen, rejected
    if isinstance(prompt, str):
        opening = [_message("user", _text(row, "prompt"))]
        # beside full dialogues this column only repeats a part of them, as in UltraFeedback
        repeated = any(message["role"] == "user" for message in chosen + rejected)
    else:
        opening = _messages(row, "prompt")
        repeated = all(d[: len(opening)] == opening for d in (chosen, rejected))
    if repeated:
        return chosen, rejected
    return opening + chosen, opening + rejected


def _messages(row: Row, name: str) -> Conversation:
    """A list of messages; one message, or the text of an assistant, counts as a list of one."""
    value = _field(row, name)
    if isinstance(value, str) and name != "prompt":
        return [_message("assistant", _text(row, name))]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else _type_name(value)
        raise _unusable(row, f"field {name!r} is {found}", "a list of messages")
    return [_as_message(row, f"{name}[{index}]", item) for index, item in enumerate(items)]


def _as_message(row: Row, name: str, item: Any) -> Message:
    wanted = "a message with role and content"
    if not isinstance(item, dict):
        raise _unusable(row, f"{name} is {_type_name(item)}", wanted)
    role, content = item.get("role"), item.get("content")
    if "from" in item and role is None:  # ShareGPT's names for the same
        role, content = _SHAREGPT_ROLES.get(item["from"], item["from"]), item.get("value")
    if not isinstance(role, str):
        raise _unusable(row, f"{name} has role {role!r}", wanted)
    if isinstance(content, list):
        content = _joined_parts(row, name, content)
    # the null keys of a typed table are no keys, and a template would print them as "None"
    extra = {key: item[key] for key in MESSAGE_KEYS if item.get(key) is not None}
    if content is None and "tool_calls" in extra:
        return {"role": role, **extra}
    if not isinstance(content, str):
        raise _unusable(row, f"{name}.content is {_type_name(content)}", "a string")
    _check_encodable(row, f"{name}.content", content)
    return {"role": role, "content": content, **extra}


def _joined_parts(row: Row, name: str, parts: Sequence[Any]) -> str:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        kinds = sorted({str(part.get("type")) for part in parts if isinstance(part, dict)})
        raise _unusable(row, f"{name}.content has parts of type {', '.join(kinds)}", "text parts")
    return "".join(map(str, texts))


def _tools(row: Row) -> list[Any] | None:
    """The `tools` column: a list of JSON schemas, or the same as a JSON string."""
    value = row.fields.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise _unusable(row, "field 'tools' is not JSON", "a list of JSON schemas") from None
    if not value:
        return None
    if not isinstance(value, list):
        raise _unusable(row, f"field 'tools' is {_type_name(value)}", "a list of JSON schemas")
    return value


def _field(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise DataError(
            f"{row.origin} has no field {name!r} (it has {', '.join(row.fields) or 'none'})",
            f"a field {name!r} in every row",
            "Correct or remove the row, or map the column with `columns`.",
        )
    value = row.fields[name]
    if value is None:
        raise _unusable(row, f"field {name!r} is null", "text or messages")
    return value


def _text(row: Row, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise _unusable(row, f"field {name!r} is {_type_name(value)}", "a string")
    _check_encodable(row, f"field {name!r}", value)
    return value


def _check_encodable(row: Row, name: str, text: str) -> None:
    """JSON can spell half a UTF-16 pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise _unusable(row, f"{name} holds half a character ({half})", "valid Unicode") from None


def _unusable(row: Row, found: str, wanted: str) -> DataError:
    return DataError(f"{row.origin}: {found}", wanted, "Correct or remove the row.")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
