"""Files of prompts and of answers: what they mean, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.answers.answer_files import answer_line, keep_whole_lines, read_answers
from dpo_dist.data.answers.questions import Question, read_questions
from dpo_dist.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeffHello?\n\n  Who's there?\n", encoding="utf-8")
    first, second = read_questions(path)
    assert first == Question(1, "Hello?", (), "p.txt:1")
    assert (second.question_id, second.prompt) == (3, "  Who's there?")


def test_rows_with_turns_messages_or_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = (
        {"question_id": 81, "category": "writing", "turns": ["one", "two", "three"]},
        {"id": "x-7", "messages": messages},
        {"prompt": "plain", "chosen": "a", "rejected": "b"},
        {"prompt": messages[1:]},
    )
    turns, conversation, text, single = read_questions(write(tmp_path / "q.jsonl", *rows))
    assert (turns.question_id, turns.prompt, turns.follow_ups) == (81, "one", ("two", "three"))
    assert turns.num_turns == 3
    assert (conversation.question_id, conversation.prompt) == ("x-7", messages)
    assert (text.question_id, text.prompt) == (3, "plain")
    assert (single.question_id, single.prompt) == (4, messages[1:])
    said = turns.conversation(("a", "b"))
    assert [m["role"] for m in said] == ["user", "assistant"] * 2 + ["user"]
    assert [m["content"] for m in said] == ["one", "a", "two", "b", "three"]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": "x"}, "q.jsonl:1 has none of the fields turns, messages, prompt"),
        ({"turns": []}, "q.jsonl:1: turns is an empty list"),
        ({"turns": "x"}, "q.jsonl:1: turns is a string"),
        ({"turns": ["x", 3]}, "q.jsonl:1: turns[1] is a number"),
        ({"prompt": 3}, "q.jsonl:1: field 'prompt' is a number"),
        ({"prompt": "x", "question_id": True}, "q.jsonl:1: question_id is a boolean"),
        ({"prompt": "x", "id": [1]}, "q.jsonl:1: id is a list"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "q.jsonl:1: messages ends with an assistant's message",
        ),
        ("x", "q.jsonl:1 holds a string"),
    ],
)
def test_rows_that_ask_nothing(tmp_path: Path, row: Any, found: str) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(write(tmp_path / "q.jsonl", row))
    assert caught.value.found == found


def test_files_without_questions(tmp_path: Path) -> None:
    empty = tmp_path / "e.txt"
    empty.write_text("\n \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for path, found in (
        (empty, f"{empty} holds no prompt"),
        (write(tmp_path / "e.jsonl"), f"{tmp_path / 'e.jsonl'} holds no prompt"),
        (tmp_path / "no.txt", f"{tmp_path / 'no.txt'} does not exist"),
        (tmp_path / "b.txt", f"{tmp_path / 'b.txt'} is not UTF-8 text"),
    ):
        with pytest.raises(DataError) as caught:
            read_questions(path)
        assert caught.value.found == found


def test_an_id_twice(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "id": 2}, {"prompt": "b"})  # the second row's id is its number
    with pytest.raises(DataError) as caught:
        read_questions(write(tmp_path / "q.jsonl", *rows))
    assert caught.value.found == "q.jsonl:2 has the id 2 of q.jsonl:1"


QUESTION = Question(81, "one", ("two",), "q.jsonl:1")


def test_fastchat_reads_the_line() -> None:
    """As its `load_model_answers`, `run_judge_pair` and `reorg_answer_file` use it."""
    line = json.loads(json.dumps(answer_line(QUESTION, ["a", "b"], "mine", "fastchat")))
    assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert line["choices"] == [{"index": 0, "turns": ["a", "b"]}]
    assert line["question_id"] == 81 and line["model_id"] == "mine"
    assert len(line["answer_id"]) == 22 and isinstance(line["tstamp"], float)


@pytest.mark.parametrize("form", ["jsonl", "fastchat"])
def test_what_was_written_is_read(tmp_path: Path, form: Any) -> None:
    path = write(tmp_path / "a.jsonl", answer_line(QUESTION, ["a", "b"], "mine", form))
    (answered,) = read_answers(path, {81: QUESTION}).values()
    assert answered.answers == ("a", "b")
    assert answered.question.conversation(("a",)) == QUESTION.conversation(("a",))


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (
            [{"question_id": 1, "prompt": "x"}],
            " has no field 'answers' (it has question_id, prompt)",
        ),
        ([{"question_id": 1, "prompt": "x", "answers": []}], ": answers is an empty list"),
        ([{"prompt": "x", "answers": ["a", "b"]}], ": has 2 answers to 1 turns"),
        ([{"question_id": 81, "choices": []}], ": choices holds no object"),
        ([{"question_id": 81, "choices": [{"turns": ["a"]}]}], ": has 1 answers to 2 turns"),
        (
            [{"question_id": 9, "choices": [{"turns": ["a"]}]}],
            ": answers question 9, which the file",
        ),
        ([{"id": 1, "prompt": "x", "answers": ["a"]}] * 2, ": answers question 1 again"),
    ],
)
def test_answer_files_that_are_none(tmp_path: Path, rows: list[Any], found: str) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        read_answers(path, {81: QUESTION})
    assert caught.value.found.startswith(f"{path}:{len(rows)}{found}")


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    assert keep_whole_lines(path) == []
    path.write_text('{"a": 1}\n{"a": "é"}\n{"a": 3')
    assert keep_whole_lines(path) == [{"a": 1}, {"a": "é"}]
    assert path.read_text() == '{"a": 1}\n{"a": "é"}\n'
    path.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    with pytest.raises(DataError) as caught:
        keep_whole_lines(path)
    assert caught.value.found == f"{path}:2 is not a JSON object"
