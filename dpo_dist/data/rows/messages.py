"""Messages of a conversation: {"role": ..., "content": ...} and what else a template may read.

The names that trainers and APIs have for the same thing become one: roles (`human`, `gpt`,
`model`, `function_call`, ...), ShareGPT's `from` and `value`, OpenAI's `function_call`, and
arguments of a tool call as JSON text.
"""

from typing import Any

from dpo_dist.data.rows.row import Row, as_list, as_object, type_name
from dpo_dist.parsing import parse_json

Message = dict[str, Any]  # role, content and, where there are, EXTRA_KEYS
Conversation = list[Message]

EXTRA_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
THOUGHT_KEYS = ("reasoning_content", "thinking")
SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
# every other role stays what it is: the template knows it, or the pair is refused
_ROLES = {
    "human": "user", "usr": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "ai": "assistant", "model": "assistant",
    "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")


def message(role: str, content: str) -> Message:
    """A message of text."""
    return {"role": role, "content": content}


def read_messages(row: Row, name: str) -> Conversation:
    """A field that is a list of messages, or such a list as JSON text; raises DataError otherwise.

    A single message counts as a list of one, and other text as the message of an assistant.
    """
    value = row.field(name)
    if isinstance(value, str):
        value = row.text(name) if (parsed := dialogue_in(row, name, value)) is None else parsed
    if isinstance(value, str):
        return [message("assistant", value)]
    single = as_object(value)
    items = as_list(value) if single is None else [single]
    if not items:
        found = type_name(value) if items is None else "an empty list"
        raise row.unusable(f"field {name!r} is {found}", "a list of messages")
    return [_as_message(row, f"{name}[{index}]", item) for index, item in enumerate(items)]


def dialogue_in(row: Row, name: str, text: str) -> list[Any] | None:
    """The messages that a text spells as JSON, as CSV files hold them; None: it is just text.

    Raises DataError when it looks like messages and is not JSON, since a model would be trained
    to write brackets.
    """
    start = text.lstrip()[:200]
    if not (start.startswith("[") and start[1:].lstrip().startswith("{")):
        return None
    if not any(f"{quote}{key}{quote}" in start for key in _ROLE_KEYS for quote in "\"'"):
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise row.unusable(
            f"field {name!r} looks like a list of messages and is not JSON ({error})",
            'messages as JSON, [{"role": "user", "content": "..."}, ...]',
        ) from None
    return as_list(value)


def read_tools(row: Row) -> list[Any] | None:
    """The `tools` column: a list of JSON schemas, or the same as a JSON string."""
    value = row.fields.get("tools")
    expected = "a list of JSON schemas"
    if isinstance(value, str) and value:
        try:
            value = parse_json(value)
        except ValueError:
            raise row.unusable("field 'tools' is not JSON", expected) from None
    if not value:
        return None
    tools = as_list(value)
    if tools is None:
        raise row.unusable(f"field 'tools' is {type_name(value)}", expected)
    # a schema in a typed table may itself be JSON text
    return [_decoded(tool) if isinstance(tool, str) else tool for tool in tools]


def read_template_kwargs(row: Row) -> dict[str, Any]:
    """The `chat_template_kwargs` column: variables of the template, an object or JSON text."""
    value: Any = row.fields.get("chat_template_kwargs") or {}
    kwargs = as_object(_decoded(value) if isinstance(value, str) else value)
    if kwargs is None:
        found = f"field 'chat_template_kwargs' is {type_name(value)}"
        raise row.unusable(found, "an object of template variables")
    return kwargs


def is_blank(answer: str | Message) -> bool:
    """Whether a text or a message says nothing: no text and no tool call."""
    if isinstance(answer, str):
        return not answer.strip()
    return not text_of(answer).strip() and not answer.get("tool_calls")


def text_of(part: str | Message) -> str:
    """The text of a message, "" when it has none."""
    return part if isinstance(part, str) else str(part.get("content") or "")


def continued(begun: Message, rest: Message) -> Message:
    """The turn that begins with `begun` and goes on with `rest`."""
    return {**begun, **rest, "content": text_of(begun) + text_of(rest)}


def num_shared(dialogue: Conversation, other: Conversation) -> int:
    """How many messages two dialogues have in common from the start."""
    for index, (ours, theirs) in enumerate(zip(dialogue, other, strict=False)):
        if not same(ours, theirs):
            return index
    return min(len(dialogue), len(other))


def num_repeated(opening: Conversation, dialogue: Conversation) -> int:
    """How many messages at the end of `opening` are the beginning of `dialogue`."""
    for count in range(min(len(opening), len(dialogue)), 0, -1):
        if all(map(same, opening[-count:], dialogue)):
            return count
    return 0


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same; space around the text is not heard."""
    return one.keys() == other.keys() and all(
        text_of(one).strip() == text_of(other).strip() if key == "content" else value == other[key]
        for key, value in one.items()
    )


def _as_message(row: Row, name: str, value: Any) -> Message:
    expected = "a message with role and content"
    item = as_object(value)
    if item is None:
        raise row.unusable(f"{name} is {type_name(value)}", expected)
    role = next((item[key] for key in _ROLE_KEYS if item.get(key) is not None), None)
    content = next((item[key] for key in _CONTENT_KEYS if item.get(key) is not None), None)
    if not isinstance(role, str):
        raise row.unusable(f"{name} has the role {role!r}", expected)
    known = role.strip().lower()
    # the null keys of a typed table are no keys, and a template would print them as "None"
    extra = {key: item[key] for key in EXTRA_KEYS if item.get(key) is not None}
    if known in _CALL_ROLES:
        calls = _decoded(row.checked_text(f"{name}.content", content))
        extra["tool_calls"] = calls if isinstance(calls, list) else [calls]
        known, content = "assistant", None
    if item.get("function_call") is not None:
        extra["tool_calls"] = [item["function_call"]]
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(row, f"{name}.tool_calls", extra["tool_calls"])
        if not extra["tool_calls"]:
            del extra["tool_calls"]
    role = _ROLES.get(known, known if known in ROLES else role)
    if content is None and "tool_calls" in extra:
        return {"role": role, **extra}
    parts = as_list(content)
    text = content if parts is None else _joined(row, name, parts)
    return {"role": role, "content": row.checked_text(f"{name}.content", text), **extra}


def _tool_calls(row: Row, name: str, value: Any) -> list[Message]:
    """Calls as templates read them: {"type": "function", "function": {"name", "arguments"}}."""
    calls = as_list(_decoded(value) if isinstance(value, str) else value)
    expected = "tool calls, each with a function's name and its arguments"
    if calls is None:
        raise row.unusable(f"{name} is {type_name(value)}", expected)
    read: list[Message] = []
    for index, item in enumerate(calls):
        call = as_object(_decoded(item) if isinstance(item, str) else item)
        function = as_object((call or {}).get("function", call))
        if call is None or function is None or not isinstance(function.get("name"), str):
            raise row.unusable(f"{name}[{index}] names no function", expected)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI's API gives them
            decoded = as_object(_decoded(arguments or "{}"))
            arguments = arguments if decoded is None else decoded
        outside = {key: call[key] for key in ("id",) if call.get(key) is not None}
        named = {"name": function["name"], "arguments": arguments}
        read.append({"type": "function", **outside, "function": named})
    return read


def _decoded(text: str) -> Any:
    """What a text spells as JSON; the text itself when it is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return text


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
