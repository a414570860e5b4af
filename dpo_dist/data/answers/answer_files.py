"""Answer files: a line a question, in our format or in FastChat's, which MT-Bench tools read.

| format | fields of a line |
| --- | --- |
| jsonl | question_id, model_id, prompt (text or messages), follow_ups, answers |
| fastchat | question_id, answer_id, model_id, choices [{index, turns}], tstamp |

FastChat's names the answers only; the questions are in another file.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_dist.data.answers.questions import Question, QuestionId, question_id_of, texts_of
from dpo_dist.data.rows.json_rows import index_json
from dpo_dist.data.rows.messages import read_messages
from dpo_dist.data.rows.row import Row, as_list, as_object
from dpo_dist.errors import DataError
from dpo_dist.parsing import parse_json
from dpo_dist.run.manifest import digest_of

Format = Literal["jsonl", "fastchat"]
SHOWN_IDS = 3
ANSWER_ID_LENGTH = 22  # as FastChat's short UUIDs


@dataclass(frozen=True)
class Answered:
    """A question with one answer a turn."""

    question: Question
    answers: tuple[str, ...]


def answer_line(
    question: Question, answers: Sequence[str], model_id: str, form: Format
) -> dict[str, Any]:
    """A question's line of an answer file."""
    if form == "fastchat":
        identity = digest_of([model_id, question.question_id, list(answers)])
        return {
            "question_id": question.question_id,
            "answer_id": identity[:ANSWER_ID_LENGTH],
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(answers)}],
            "tstamp": time.time(),
        }
    return {
        "question_id": question.question_id,
        "model_id": model_id,
        "prompt": question.prompt,
        "follow_ups": list(question.follow_ups),
        "answers": list(answers),
    }


def keep_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is being appended to; a last one that a kill cut short is removed.

    Raises DataError when another line is not a JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = as_object(parse_json(line))
        except ValueError:
            row = None
        if row is None:
            raise DataError(
                f"{path}:{number} is not a JSON object",
                "the lines that were written",
                f"Remove the line, or delete {path} to start over.",
            )
        rows.append(row)
    if len(whole) != len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    return rows


def read_answers(
    path: Path, questions: Mapping[QuestionId, Question] | None
) -> dict[QuestionId, Answered]:
    """The answers of a file in either format, by question, in the file's order.

    `questions` are needed for FastChat's. Raises DataError for a file that is not there, a row of
    neither format, a question that is unknown or comes twice, and answers too few or too many.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist", "an answer file", "Write one with `dpo-dist generate`."
        )
    rows = index_json(path, str(path), None)
    found: dict[QuestionId, Answered] = {}
    for number, row in enumerate(rows.read(range(len(rows))), start=1):
        answered = _answered(row.sound(), number, questions)
        question_id = answered.question.question_id
        if question_id in found:
            raise row.unusable(f"answers question {question_id!r} again", "a line a question")
        if len(answered.answers) != answered.question.num_turns:
            raise row.unusable(
                f"has {len(answered.answers)} answers to {answered.question.num_turns} turns",
                "an answer a turn",
            )
        found[question_id] = answered
    if not found:
        raise DataError(f"{path} holds no answer", "at least one", "Generate the answers first.")
    return found


def check_same_questions(
    files: tuple[Path, Path],
    first: dict[QuestionId, Answered],
    second: dict[QuestionId, Answered],
) -> None:
    """Raises DataError unless two answer files answer the same questions."""
    missing = {
        files[1]: [i for i in first if i not in second],
        files[0]: [i for i in second if i not in first],
    }
    for path, ids in missing.items():
        if ids:
            shown = ", ".join(map(str, ids[:SHOWN_IDS])) + ", ..." * (len(ids) > SHOWN_IDS)
            raise DataError(
                f"{path} has no answer to {len(ids)} questions of the other file ({shown})",
                "answers to the same questions",
                "Generate both from the same prompts.",
            )
    for question_id, answered in first.items():
        one, other = answered.question, second[question_id].question
        if (one.conversation(()), one.follow_ups) != (other.conversation(()), other.follow_ups):
            raise DataError(
                f"{one.origin} and {other.origin} name different questions {question_id!r}",
                "answers to the same questions",
                "Generate both from the same prompts.",
            )


def _answered(row: Row, number: int, questions: Mapping[QuestionId, Question] | None) -> Answered:
    question_id = question_id_of(row, number)
    if "choices" in row.fields:
        first = as_object((as_list(row.fields["choices"]) or [None])[0])
        if first is None:
            raise row.unusable("choices holds no object", "[{index, turns}]")
        answers = texts_of(row, "choices[0].turns", first.get("turns"))
        if questions is None:
            raise DataError(
                f"{row.origin} is in FastChat's format, which leaves out the questions",
                "the file of the questions as well",
                "Add --questions question.jsonl.",
            )
        if question_id not in questions:
            raise row.unusable(
                f"answers question {question_id!r}, which the file of questions has not",
                "one of its ids",
            )
        return Answered(questions[question_id], tuple(answers))
    answers = texts_of(row, "answers", row.field("answers"))
    prompt = row.field("prompt")
    question = Question(
        question_id,
        prompt if isinstance(prompt, str) else read_messages(row, "prompt"),
        tuple(texts_of(row, "follow_ups", f)) if (f := row.fields.get("follow_ups")) else (),
        row.origin,
    )
    return Answered(question, tuple(answers))
