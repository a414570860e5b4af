"""Names and shapes that people's rows have for the same thing, and rows that are refused."""

import json
from typing import Any

import pytest

from dpo_dist.data.rows.formats import detect_format, implied_columns, read_pair
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row
from dpo_dist.errors import DataError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl:7")


def pair_of(**fields: Any) -> Pair:
    pair = read_pair(row(**fields), detect_format(row(**fields), "data.train.0"), "rows")
    assert isinstance(pair, Pair), pair
    return pair


def error_of(**fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        pair_of(**fields)
    return str(caught.value)


def call_of(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"),
     ("ai", "assistant"), ("bot", "assistant"), ("observation", "tool"), ("function", "tool"),
     ("developer", "developer"), ("narrator", "narrator")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_have_one_name(key: str, name: str, role: str) -> None:
    turn = {key: name, "content" if key == "role" else "value": "Q"}
    pair = pair_of(prompt=[turn, user("R")], chosen=[assistant("A")], rejected=[assistant("B")])
    assert pair.prompt[0] == {"role": role, "content": "Q"}


def test_an_answer_of_an_unknown_role_is_named() -> None:
    assert error_of(prompt=[user("Q")], chosen=[{"role": "oracle", "content": "A"}],
                    rejected=[assistant("B")]) == (
        "rows.jsonl:7: an answer has the role 'oracle'; expected assistant (gpt, model, bot and ai "
        "are read as it). Correct or remove the row."
    )  # fmt: skip


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "SF"}}'},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"city": "SF"}'}},
        {"role": "assistant", "content": None, "tool_calls": [call_of("f", '{"city": "SF"}')]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "SF"}}]},
        {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"city": "SF"}}]'},
    ],
)
def test_tool_calls_have_one_shape(turn: dict[str, Any]) -> None:
    pair = pair_of(prompt=[user("Q")], chosen=[turn], rejected=[assistant("B")])
    assert pair.chosen == [{"role": "assistant", "tool_calls": [call_of("f", {"city": "SF"})]}]


def test_tool_calls_without_a_function() -> None:
    turn = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    assert error_of(prompt=[user("Q")], chosen=[turn], rejected=[assistant("B")]) == (
        "rows.jsonl:7: chosen[0].tool_calls[0] names no function; expected tool calls, each with a "
        "function's name and its arguments. Correct or remove the row."
    )


def test_a_dialogue_as_json_text_is_a_dialogue() -> None:
    texts = {name: json.dumps([user("Q"), assistant(name)]) for name in ("chosen", "rejected")}
    pair = pair_of(**texts)
    assert pair.prompt == [user("Q")] and pair.chosen == [assistant("chosen")]
    pair = pair_of(prompt=json.dumps([user("R")]), chosen="[1] is right", rejected="no")
    assert pair.prompt == [user("R")] and pair.chosen == [assistant("[1] is right")]
    assert error_of(chosen="[{'role': 'user', 'content': 'Q'}]", rejected="no") == (
        "rows.jsonl:7: field 'chosen' looks like a list of messages and is not JSON (Expecting "
        "property name enclosed in double quotes: line 1 column 3 (char 2)); expected messages as "
        'JSON, [{"role": "user", "content": "..."}, ...]. Correct or remove the row.'
    )


def test_a_list_that_holds_the_answer_is_no_prompt() -> None:
    good, bad = [user("Q"), assistant("good")], [user("Q"), assistant("bad")]
    assert implied_columns(row(messages=good, chosen=good, rejected=bad)) == {}
    assert implied_columns(row(messages=good[:1], chosen=good, rejected=bad)) == {
        "prompt": "messages"
    }
    pair = pair_of(prompt=good, chosen=good, rejected=bad)
    assert pair.prompt == [user("Q")] and pair.chosen == [assistant("good")]


@pytest.mark.parametrize("space", ["", " "])
def test_turns_of_the_prompt_that_an_answer_repeats_stand_once(space: str) -> None:
    prompt = [system("S"), user("P"), assistant("p"), user("Q")]
    for repeated in range(len(prompt) + 1):
        turns = prompt[len(prompt) - repeated :]
        turns = [{**turn, "content": turn["content"] + space} for turn in turns]
        pair = pair_of(
            prompt=prompt, chosen=[*turns, assistant("A")], rejected=[*turns, assistant("B")]
        )
        assert pair.prompt == prompt and pair.rejected == [assistant("B")]


@pytest.mark.parametrize("shown", ["beyond", "own turn", "whole turn"])
def test_a_prompt_that_ends_in_the_beginning_of_the_answer(shown: str) -> None:
    begun = assistant("Sure, ")

    def answer(text: str) -> list[dict[str, Any]]:
        return {
            "beyond": [assistant(text)],
            "own turn": [user("Q"), begun, assistant(text)],
            "whole turn": [user("Q"), assistant("Sure, " + text)],
        }[shown]

    pair = pair_of(prompt=[user("Q"), begun], chosen=answer("yes"), rejected=answer("no"))
    assert pair.prompt == [user("Q"), begun] and pair.continues_turn
    assert (pair.chosen, pair.rejected) == ([assistant("yes")], [assistant("no")])


def test_a_system_column_beside_dialogues() -> None:
    turns = [user("Q"), assistant("A")], [user("Q"), assistant("B")]
    for own in ([], [system("S")]):
        pair = pair_of(system="S", chosen=[*own, *turns[0]], rejected=[*own, *turns[1]])
        assert pair.prompt == [system("S"), user("Q")]
    assert error_of(system="T", chosen=[system("S"), *turns[0]], rejected=turns[1]) == (
        "rows.jsonl:7: field 'system' and the dialogue's own system message differ; expected one "
        "system message. Correct or remove the row."
    )
    assert error_of(system="S", prompt="Q", chosen="A", rejected="B") == (
        "rows.jsonl:7: field 'system' stands beside texts, which have no place for it; expected a "
        "dialogue, or the system message at the beginning of the prompt. Correct or remove the row."
    )


def test_media_are_refused_and_an_empty_column_is_not() -> None:
    assert pair_of(images=[], prompt="Q", chosen="A", rejected="B").prompt == "Q"
    assert error_of(images=["a.png"], prompt="Q", chosen="A", rejected="B") == (
        "rows.jsonl:7: field 'images' holds media; expected text only. Correct or remove the row."
    )


def test_a_question_that_would_not_be_read() -> None:
    for name, text in (("query", "Why"), ("theme", "Why is it so?")):
        for answers in (("It is A", "It is B"), ([assistant("A")], [assistant("B")])):
            with pytest.raises(DataError) as caught:
                detect_format(
                    row(**{name: text}, chosen=answers[0], rejected=answers[1]), "data.train.0"
                )
            assert str(caught.value) == (
                f"rows.jsonl:7 has no prompt, and a column {name!r} that would not be read; "
                "expected a prompt, or answers that hold it. Map it with "
                f"data.train.0.columns={{prompt: {name}}}, or remove the column."
            )
    fields = {"query": "Why", "chosen": "Why? A", "rejected": "Why? B"}
    assert detect_format(row(**fields), "data.train.0") == "standard"


def test_variables_of_the_template() -> None:
    fields = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        pair = pair_of(**fields, chat_template_kwargs=kwargs)
        assert pair.template_kwargs == {"enable_thinking": False}
    assert error_of(**fields, chat_template_kwargs=[1]) == (
        "rows.jsonl:7: field 'chat_template_kwargs' is a list; expected an object of template "
        "variables. Correct or remove the row."
    )
