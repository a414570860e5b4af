"""Rows of a prompt with several answers and their scores or ranks, and the pairs they make.

1. `read_answers` finds the answers and how good each is: in UltraFeedback's and Nectar's rows the
   score stands in the answer's object, in plain ones in a list beside.
2. `choose_pairs` says which answers are paired.
3. `pair_rows` makes a row of two dialogues of each pair, which is read as any other.
"""

import itertools
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.config.data_section import PairChoice
from dpo_dist.data.rows.dialogues import dialogue_of, hh_dialogue
from dpo_dist.data.rows.formats import ANSWER_LISTS, alpaca_prompt
from dpo_dist.data.rows.messages import Conversation, message, read_messages
from dpo_dist.data.rows.row import Row, RowError, as_list, as_object, type_name
from dpo_dist.parsing import parse_json

_TEXT_KEYS = ("response", "answer", "completion", "text", "content")
_SCORE_KEYS = ("overall_score", "score", "helpfulness")
_RANK, _RANKS = "rank", "ranks"
_ROLE_KEYS = ("role", "from")  # of an answer that is itself a message
_HH_PROMPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """A way in which the prompt goes on; of two the one with the higher score is better."""

    messages: Conversation
    score: float


def pair_rows(row: Row, choice: PairChoice) -> list[Row]:
    """A row of `prompt`, `chosen`, `rejected` and their scores for each pair, the best first.

    There is none when all answers have the same score. Raises RowError for an unusable row.
    """
    answers, prompt = read_answers(row), read_prompt(row)
    others = {name: value for name, value in row.fields.items() if name not in ANSWER_LISTS}
    return [
        Row(
            {
                **others, "prompt": prompt,
                "chosen": answers[better].messages, "chosen_score": answers[better].score,
                "rejected": answers[worse].messages, "rejected_score": answers[worse].score,
            },
            row.origin,
        )
        for better, worse in choose_pairs([answer.score for answer in answers], choice)
    ]  # fmt: skip


def choose_pairs(scores: Sequence[float], choice: PairChoice) -> list[tuple[int, int]]:
    """(better, worse) indices into `scores`; two answers of the same score are never a pair.

    Where one answer has to stand for all of its score, it is the first.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    firsts = [next(tied) for _, tied in itertools.groupby(order, key=lambda index: scores[index])]
    if len(firsts) < 2:
        return []
    best, worst = firsts[0], firsts[-1]
    match choice:
        case "best_vs_worst":
            return [(best, worst)]
        case "best_vs_rest":
            return [(best, index) for index in order if scores[index] < scores[best]]
        case "adjacent":
            return list(itertools.pairwise(firsts))
        case "all":
            pairs = itertools.combinations(order, 2)
            return [(better, worse) for better, worse in pairs if scores[better] > scores[worse]]


def read_prompt(row: Row) -> Conversation:
    """The turns before the answers: messages, a text `Human: ... Assistant:`, or a question."""
    if "instruction" in row.fields and row.fields.get("prompt") is None:
        return alpaca_prompt(row)
    name = "question" if "question" in row.fields and "prompt" not in row.fields else "prompt"
    if (turns := dialogue_of(row, name)) is not None:
        return turns
    text = row.text(name)
    if not _HH_PROMPT.fullmatch(text):
        return [message("user", text)]
    return hh_dialogue(row, name)[:-1]  # without the empty turn at the end


def read_answers(row: Row) -> list[Answer]:
    """All answers of a row; raises RowError when it has none, or not a score or rank for each."""
    name = next((name for name in ANSWER_LISTS if row.fields.get(name) is not None), "responses")
    items = _list_of(row, name)
    labels = [f"{name}[{index}]" for index in range(len(items))]
    messages = [read_answer(row, label, item) for label, item in zip(labels, items, strict=True)]
    scores = _scores_beside(row, name, items) or _scores_inside(row, labels, items)
    return list(map(Answer, messages, scores))


def read_answer(row: Row, label: str, value: Any) -> Conversation:
    """The messages of an answer: a text, messages, or an object that holds one of them."""
    item = as_object(value)
    if item is not None and not any(key in item for key in _ROLE_KEYS):
        key = next((key for key in _TEXT_KEYS if item.get(key) is not None), None)
        if key is None:
            found = f"{label} has {', '.join(item) or 'no keys'}"
            raise row.unusable(found, f"an answer under {_either(_TEXT_KEYS)}")
        label, value = f"{label}.{key}", item[key]
    return read_messages(Row({label: value}, row.origin), label)


def _list_of(row: Row, name: str) -> list[Any]:
    """A field that is a list, or a list as JSON text, as CSV files hold it."""
    value = row.field(name)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise row.unusable(f"field {name!r} is text", "a list, as JSON") from None
    items = as_list(value)
    if items is None:
        raise row.unusable(f"field {name!r} is {type_name(value)}", "a list")
    return items


def _scores_beside(row: Row, name: str, items: list[Any]) -> list[float]:
    """The scores in a column of their own; none where there is no such column."""
    column = next((c for c in ("scores", _RANKS) if row.fields.get(c) is not None), None)
    if column is None:
        return []
    values = _list_of(row, column)
    if len(values) != len(items):
        found = f"{len(items)} {name} and {len(values)} {column}"
        raise row.unusable(found, f"a {column[:-1]} for each answer")
    scores = [row.checked_number(f"{column}[{index}]", value) for index, value in enumerate(values)]
    return _from_ranks(row, scores) if column == _RANKS else scores


def _scores_inside(row: Row, labels: list[str], items: list[Any]) -> list[float]:
    """The scores that stand in the answers' own objects, under the name that the first one has."""
    objects = [as_object(item) or {} for item in items]
    keys = (*_SCORE_KEYS, _RANK)
    key = next((key for key in keys if objects and key in objects[0]), None)
    scores: list[float] = []
    for label, item in zip(labels, objects, strict=True):
        if key is None or key not in item:
            found = f"{label} has no {key or 'score'}"
            expected = f"{key or _either(keys)} in each answer, or a column scores or ranks"
            raise row.unusable(found, expected)
        scores.append(row.checked_number(f"{label}.{key}", item[key]))
    return _from_ranks(row, scores) if key == _RANK else scores


def _from_ranks(row: Row, ranks: list[float]) -> list[float]:
    """Ranks, of which 1 is the best, as scores: the difference of two is that of their ranks."""
    rank, count = max(Counter(ranks).items(), key=operator.itemgetter(1), default=(0, 0))
    if count > 1:
        raise RowError(
            f"{row.origin}: {count} answers have rank {rank:g}",
            "another rank for each answer, 1 for the best",
            "Correct or remove the row, or give scores, of which equal ones make no pair.",
        )
    return [-rank for rank in ranks]


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
