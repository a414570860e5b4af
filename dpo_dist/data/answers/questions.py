"""Prompts to answer: a text file with one a line, or JSON rows with a prompt, messages or turns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.data.rows.json_rows import index_json
from dpo_dist.data.rows.messages import Conversation, message, read_messages
from dpo_dist.data.rows.row import Row, as_list, type_name
from dpo_dist.errors import DataError

QuestionId = int | str
ID_FIELDS = ("question_id", "id")
PROMPT_FIELDS = ("turns", "messages", "prompt")


@dataclass(frozen=True)
class Question:
    """What a model is asked: a prompt, and further user turns that follow its answers."""

    question_id: QuestionId
    prompt: str | Conversation  # text waits to be a user's message, where there is a template
    follow_ups: tuple[str, ...]
    origin: str

    @property
    def num_turns(self) -> int:
        """Answers that it takes."""
        return 1 + len(self.follow_ups)

    def conversation(self, answers: tuple[str, ...]) -> Conversation:
        """The messages up to the turn behind these answers, which waits for the next."""
        first = self.prompt
        messages = [message("user", first)] if isinstance(first, str) else list(first)
        for reply, follow_up in zip(answers, self.follow_ups, strict=False):
            messages += [message("assistant", reply), message("user", follow_up)]
        return messages


def read_questions(path: Path) -> list[Question]:
    """The questions of a `.txt` file, or of JSON rows: `turns` (MT-Bench), `messages`, `prompt`.

    Ids come from `question_id` or `id`, else the line's number. Raises DataError for a file that
    is not there or empty, a row without a question, and an id that comes twice.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", "a file of prompts", "Correct the path.")
    questions = _text_questions(path) if path.suffix == ".txt" else _json_questions(path)
    if not questions:
        raise DataError(f"{path} holds no prompt", "at least one", "Add prompts to it.")
    seen: dict[QuestionId, str] = {}
    for question in questions:
        if (first := seen.setdefault(question.question_id, question.origin)) != question.origin:
            raise DataError(
                f"{question.origin} has the id {question.question_id!r} of {first}",
                "an id of its own for every question",
                "Correct its question_id.",
            )
    return questions


def _text_questions(path: Path) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 text", "a prompt a line", "Convert it, for example with iconv."
        ) from None
    return [
        Question(number, line, (), f"{path.name}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _json_questions(path: Path) -> list[Question]:
    rows = index_json(path, path.name, None)
    read = enumerate(rows.read(range(len(rows))), start=1)
    return [_question(row.sound(), number) for number, row in read]


def _question(row: Row, number: int) -> Question:
    question_id = question_id_of(row, number)
    name = next((name for name in PROMPT_FIELDS if row.fields.get(name) is not None), None)
    if name is None:
        found = f"{row.origin} has none of the fields {', '.join(PROMPT_FIELDS)}"
        raise DataError(found, "a question in every row", "Add one of them, or remove the row.")
    if name == "turns":
        first, *follow_ups = texts_of(row, "turns", row.fields["turns"])
        return Question(question_id, first, tuple(follow_ups), row.origin)
    if isinstance(row.fields[name], str):
        return Question(question_id, row.text(name), (), row.origin)
    messages = read_messages(row, name)
    if messages[-1]["role"] == "assistant":
        raise row.unusable(f"{name} ends with an assistant's message", "a turn to answer")
    return Question(question_id, messages, (), row.origin)


def question_id_of(row: Row, number: int) -> QuestionId:
    """A row's own id, or its number; raises DataError when it is neither text nor an integer."""
    for name in ID_FIELDS:
        value = row.fields.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise row.unusable(f"{name} is {type_name(value)}", "text or an integer")
            return value
    return number


def texts_of(row: Row, name: str, value: Any) -> list[str]:
    """A list of at least one text; raises DataError otherwise."""
    items = as_list(value)
    if not items:
        found = type_name(value) if items is None else "an empty list"
        raise row.unusable(f"{name} is {found}", "a list of texts")
    return [row.checked_text(f"{name}[{index}]", item) for index, item in enumerate(items)]
