"""Row formats: what a row of a preference file means.

1. `detect_format` looks at the columns of a source's first row, once per source.
2. `read_pair` turns a row into a `Pair`: a prompt and two answers, as text or as messages.
3. `score_margin` reads the scores of the two answers, where a source has them.

The prompt of a conversation is what both sides share. The few lines TRL has for an implicit prompt
are written here anew: importing trl doubles the start of this stage.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dpo_dist.config.data_section import PreferenceFormat
from dpo_dist.data.drop_reasons import UNPAIRED
from dpo_dist.data.rows.dialogues import (
    NoPair,
    dialogue_of,
    dialogue_pair,
    hh_dialogue,
    shared_prompt_pair,
    system_of,
)
from dpo_dist.data.rows.messages import Conversation, message, read_template_kwargs
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row, RowError, as_list, type_name
from dpo_dist.errors import DataError

COLUMNS = (
    "prompt", "chosen", "rejected", "system", "question", "response_j", "response_k", "tools",
    "chosen_score", "rejected_score", "completion", "label", "chat_template_kwargs",
    "responses", "scores", "ranks", "response", "score",
)  # fmt: skip
DIALOGUE_COLUMNS = ("conversations", "messages")  # LlamaFactory's and Axolotl's names of the prompt
QUESTION_COLUMNS = frozenset((
    "query", "input", "user", "human", "request", "problem", "task", "context", "post", "document",
    "user_prompt", "user_input", "user_message", "prompt_text", "question_text",
))  # fmt: skip
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
# Our name -> the name in UltraFeedback and in data made from it.
SCORE_NAMES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}
LABELLED_COLUMNS = frozenset(("completion", "label"))
ANSWER_LISTS = ("responses", "completions", "answers")  # all answers to a prompt in one row
ANSWER_COLUMNS, SCORE_COLUMNS = ("response", "completion"), ("score", "helpfulness")  # one of them
# all that rows are read for; what media columns hold is not looked at
READ_COLUMNS = frozenset(
    (*COLUMNS, *DIALOGUE_COLUMNS, "instruction", "input", "history", *SCORE_NAMES.values(),
     *ANSWER_LISTS, *SCORE_COLUMNS)
)  # fmt: skip
_HH_START = re.compile(r"\s*Human:")


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
    has_answers = {"chosen", "rejected"} <= names or not names.isdisjoint(ANSWER_LISTS)
    if has_answers and "prompt" not in names:
        for name in DIALOGUE_COLUMNS:
            # one that ends in an assistant turn holds an answer: no prompt
            if turns := dialogue_of(row, name):
                return {} if turns[-1]["role"] == "assistant" else {"prompt": name}
    return {}


def detect_format(row: Row, where: str) -> PreferenceFormat:
    """The format of a source by the columns of its first row; `where` is its key in the config."""
    names = row.fields.keys()
    if {"question", "response_j", "response_k"} <= names:
        return "stack_exchange"
    if not {"chosen", "rejected"} <= names:
        return _format_of_answers(row, where)
    chosen = row.field("chosen")
    prompt, turns = (dialogue_of(row, name) for name in ("prompt", "chosen"))
    if prompt is not None:
        return "conversational"
    if turns is not None:
        if isinstance(row.fields.get("prompt"), str):
            return "ultrafeedback"
        if all(turn["role"] == "assistant" for turn in turns):
            _refuse_unread_question(row, where)
        return "conversational"
    if "prompt" in names:
        return "standard"
    if "question" in names:
        return "orca"
    if "instruction" in names:
        return "alpaca"
    if _HH_START.match(chosen):
        return "hh"
    _refuse_unread_question(row, where)
    return "standard"


def detected(
    rows: Iterable[Row], columns: dict[str, str], where: str
) -> tuple[dict[str, str], PreferenceFormat]:
    """Columns and format by the first row that can be read; raises the first error if none can."""
    first: RowError | None = None
    for row in rows:
        try:
            row = rename_columns(row.sound(), columns)
            implied = implied_columns(row)
            return columns | implied, detect_format(rename_columns(row, implied), where)
        except RowError as error:
            first = first or error
    assert first is not None, "the source has rows"
    raise first


def read_pair(row: Row, row_format: PreferenceFormat, source: str) -> Pair | NoPair:
    """The pair of a row, or the reason to drop it; raises DataError at a field that is unusable."""
    if row.lacks_partner:
        return UNPAIRED
    for name in MEDIA_COLUMNS:
        if row.fields.get(name):
            raise row.unusable(f"field {name!r} holds media", "text only")
    pair = _read(row, row_format, source)
    kwargs = read_template_kwargs(row)
    return replace(pair, template_kwargs=kwargs) if kwargs and isinstance(pair, Pair) else pair


def score_margin(row: Row, required: bool) -> float | None:
    """chosen_score - rejected_score; None for a row without usable scores.

    Raises DataError for such a row when scores are `required`.
    """
    scores: list[float] = []
    for ours, known in SCORE_NAMES.items():
        name = known if ours not in row.fields and known in row.fields else ours
        if required and name not in row.fields:
            row.field(name)  # raises with the columns that there are
        try:
            scores.append(row.checked_number(f"field {name!r}", row.fields.get(name)))
        except RowError:
            if required:
                raise
            return None
    return scores[0] - scores[1]


def _read(row: Row, row_format: PreferenceFormat, source: str) -> Pair | NoPair:
    match row_format:
        case "standard":
            return _text_pair(row, source)
        case "orca":
            prompt = [*system_of(row), message("user", row.text("question"))]
            return _single_turn_pair(row, prompt, "chosen", "rejected", source)
        case "alpaca":
            return _single_turn_pair(row, alpaca_prompt(row), "chosen", "rejected", source)
        case "stack_exchange":
            prompt = [*system_of(row), message("user", row.text("question"))]
            return _single_turn_pair(row, prompt, "response_j", "response_k", source)
        case "hh":
            chosen, rejected = (hh_dialogue(row, name) for name in ("chosen", "rejected"))
            return shared_prompt_pair(row, chosen, rejected, source)
        case "ultrafeedback" | "conversational" | "ranked":  # by now each row has two answers
            return dialogue_pair(row, source)
        case "auto" | "labelled" | "scored":
            raise AssertionError("the format is settled before rows are read")


def _format_of_answers(row: Row, where: str) -> PreferenceFormat:
    """The format of rows that are not pairs yet, by the columns of the first one."""
    names = row.fields.keys()
    if names >= LABELLED_COLUMNS or names >= {"messages", "label"}:
        raise DataError(
            f"{row.origin} has the columns {', '.join(names)}: one answer and a label, as for KTO",
            "two answers to a prompt, chosen and rejected",
            f"Set {where}.format=labelled to pair good and bad answers to the same prompt.",
        )
    if not names.isdisjoint(ANSWER_LISTS):
        return "ranked"
    if not names.isdisjoint(ANSWER_COLUMNS) and not names.isdisjoint(SCORE_COLUMNS):
        return "scored"
    raise DataError(
        f"{row.origin} has the columns {', '.join(names) or '(none)'}",
        "chosen and rejected; question, response_j and response_k; or responses and scores",
        f"Map the file's names, for example {where}.columns={{chosen: good, rejected: bad}}.",
    )


def _text_pair(row: Row, source: str) -> Pair:
    """Without a prompt column the prompt is what both texts begin with.

    It then ends before the last whitespace of the shared part, so that it holds whole words and
    an answer begins with the space that belongs to its first token.
    """
    if row.fields.get("system"):
        raise row.unusable(
            "field 'system' stands beside texts, which have no place for it",
            "a dialogue, or the system message at the beginning of the prompt",
        )
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if "prompt" in row.fields:
        return Pair(row.text("prompt"), chosen, rejected, source, row.origin)
    prompt = re.sub(r"\s*\w*$", "", os.path.commonprefix([chosen, rejected]))
    start = len(prompt)
    return Pair(prompt, chosen[start:], rejected[start:], source, row.origin)


def alpaca_prompt(row: Row) -> Conversation:
    """The instruction and, on a line of its own, its input; system and turns before it if any."""
    turns = system_of(row)
    history: object = row.fields.get("history") or []
    before = as_list(history)
    if before is None:
        raise row.unusable(f"field 'history' is {type_name(history)}", "a list of turns")
    for number, turn in enumerate(before):
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
    better, worse = ([message("assistant", row.text(name))] for name in (chosen, rejected))
    return Pair(prompt, better, worse, source, row.origin)


def _refuse_unread_question(row: Row, where: str) -> None:
    """Raises DataError at answers without a prompt beside a text that looks like the question."""
    said = str(row.field("chosen"))
    for name, value in row.fields.items():
        if not isinstance(value, str) or not value.strip() or value.strip() in said:
            continue
        if name in QUESTION_COLUMNS or (name not in COLUMNS and value.rstrip().endswith("?")):
            raise DataError(
                f"{row.origin} has no prompt, and a column {name!r} that would not be read",
                "a prompt, or answers that hold it",
                f"Map it with {where}.columns={{prompt: {name}}}, or remove the column.",
            )
