"""Messages of a conversation: {"role": ..., "content": ...} and what else a template may read."""

import json
from typing import Any

from dpo_dist.data.rows.row import Row, as_list, as_object, type_name

Message = dict[str, Any]  # role, content and, where there are, EXTRA_KEYS
Conversation = list[Message]

EXTRA_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
SYSTEM_ROLES = ("system", "developer")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def message(role: str, content: str) -> Message:
    """A message of text."""
    return {"role": role, "content": content}


def read_messages(row: Row, name: str) -> Conversation:
    """A field that is a list of messages; raises DataError otherwise.

    A single message counts as a list of one, and text as the message of an assistant.
    """
    value = row.field(name)
    if isinstance(value, str):
        return [message("assistant", row.text(name))]
    single = as_object(value)
    items = as_list(value) if single is None else [single]
    if not items:
        found = type_name(value) if items is None else "an empty list"
        raise row.unusable(f"field {name!r} is {found}", "a list of messages")
    return [_as_message(row, f"{name}[{index}]", item) for index, item in enumerate(items)]


def read_tools(row: Row) -> list[Any] | None:
    """The `tools` column: a list of JSON schemas, or the same as a JSON string."""
    value = row.fields.get("tools")
    expected = "a list of JSON schemas"
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise row.unusable("field 'tools' is not JSON", expected) from None
    if not value:
        return None
    tools = as_list(value)
    if tools is None:
        raise row.unusable(f"field 'tools' is {type_name(value)}", expected)
    return tools


def is_blank(answer: str | Message) -> bool:
    """Whether a text or a message says nothing: no text and no tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not text_of(answer).strip() and not answer.get("tool_calls")


def text_of(part: str | Message) -> str:
    """The text of a message, "" when it has none."""
    return part if isinstance(part, str) else str(part.get("content") or "")


def num_shared(dialogue: Conversation, other: Conversation) -> int:
    """How many messages two dialogues have in common from the start."""
    for index, (ours, theirs) in enumerate(zip(dialogue, other, strict=False)):
        if ours != theirs:
            return index
    return min(len(dialogue), len(other))


def _as_message(row: Row, name: str, value: Any) -> Message:
    expected = "a message with role and content"
    item = as_object(value)
    if item is None:
        raise row.unusable(f"{name} is {type_name(value)}", expected)
    role, content = item.get("role"), item.get("content")
    if role is None and "from" in item:  # ShareGPT's names for the same
        role, content = _SHAREGPT_ROLES.get(item["from"], item["from"]), item.get("value")
    if not isinstance(role, str):
        raise row.unusable(f"{name} has the role {role!r}", expected)
    # the null keys of a typed table are no keys, and a template would print them as "None"
    extra = {key: item[key] for key in EXTRA_KEYS if item.get(key) is not None}
    if content is None and "tool_calls" in extra:
        return {"role": role, **extra}
    parts = as_list(content)
    text = content if parts is None else _joined(row, name, parts)
    return {"role": role, "content": row.checked_text(f"{name}.content", text), **extra}


def _joined(row: Row, name: str, parts: list[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        item = as_object(part)
        text = part if item is None else item.get("text")
        if not isinstance(text, str):
            kind = type_name(part) if item is None else f"of type {item.get('type')!r}"
            raise row.unusable(f"{name}.content has a part that is {kind}", "parts of text")
        texts.append(text)
    return "".join(texts)
