"""Row formats: detection, the pair of a row, multi-turn dialogues, and what an error says."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from dpo_dist.config.data_section import PreferenceFormat
from dpo_dist.data.drop_reasons import DROP_REASONS, NO_SHARED_PROMPT, NOTES
from dpo_dist.data.rows.formats import (
    Pair,
    check_column_map,
    detect_format,
    implied_columns,
    read_pair,
    rename_columns,
)
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


def pair_of(row_format: PreferenceFormat | None = None, **fields: Any) -> Pair:
    found = read_pair(row(**fields), row_format or detect_format(row(**fields), "k"), "source")
    assert isinstance(found, Pair), found
    return found


def parts_of(pair: Pair) -> tuple[Any, Any, Any]:
    """The prompt, and answers without their list where they are one message."""
    answers = (pair.chosen, pair.rejected)
    chosen, rejected = (
        answer[0] if isinstance(answer, list) and len(answer) == 1 else answer for answer in answers
    )
    return pair.prompt, chosen, rejected


def error_of(row_format: PreferenceFormat | None = None, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        pair_of(row_format, **fields)
    return str(caught.value)


ONE_TURN = ([user("Q")], assistant("A"), assistant("B"))
FORMATS: list[tuple[PreferenceFormat, dict[str, Any], tuple[Any, Any, Any]]] = [
    ("standard", {"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A", "B")),
    ("standard", {"chosen": "Q is A", "rejected": "Q is B"}, ("Q is", " A", " B")),
    ("orca", {"system": "", "question": "Q", "chosen": "A", "rejected": "B"}, ONE_TURN),
    ("orca", {"question": "Q", "chosen": "A", "rejected": "B"}, ONE_TURN),
    (
        "orca",
        {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
        ([system("S"), user("Q")], assistant("A"), assistant("B")),
    ),
    ("alpaca", {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}, ONE_TURN),
    (
        "alpaca",
        {"instruction": "Q", "input": "I", "system": "S", "history": [["1", "2"]],
         "chosen": "A", "rejected": "B"},
        ([system("S"), user("1"), assistant("2"), user("Q\nI")], assistant("A"), assistant("B")),
    ),
    ("stack_exchange", {"question": "Q", "response_j": "A", "response_k": "B"}, ONE_TURN),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nAssistant: B",
        },
        ONE_TURN,
    ),
    (
        "ultrafeedback",
        {
            "prompt": "Q",
            "chosen": [user("Q"), assistant("A")],
            "rejected": [user("Q"), assistant("B")],
        },
        ONE_TURN,
    ),
    # as the hub's UltraFeedback has it: the prompt column alone, answers alone
    ("ultrafeedback", {"prompt": "Q", "chosen": [assistant("A")], "rejected": [assistant("B")]},
     ONE_TURN),
    (
        "conversational",
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        ONE_TURN,
    ),
    (
        "conversational",
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        ONE_TURN,
    ),
    # an explicit prompt that the dialogues repeat, text answers, single messages
    (
        "conversational",
        {
            "prompt": [user("Q")],
            "chosen": [user("Q"), assistant("A")],
            "rejected": [user("Q"), assistant("B")],
        },
        ONE_TURN,
    ),
    ("conversational", {"prompt": [user("Q")], "chosen": "A", "rejected": "B"}, ONE_TURN),
    (
        "conversational",
        {
            "prompt": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        ONE_TURN,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row_format", "fields", "parts"), FORMATS)
def test_every_format_is_detected_and_read(
    row_format: PreferenceFormat, fields: dict[str, Any], parts: tuple[Any, Any, Any]
) -> None:
    assert detect_format(row(**fields), "k") == row_format
    pair = pair_of(**fields)
    assert parts_of(pair) == parts
    assert (pair.source, pair.origin, pair.has_several_turns) == ("source", "rows.jsonl:7", False)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not inside `bl`
        ("Q: yes\nA: no", "Q: yes\nA: yes", "Q: yes\nA:"),
        ("one two", "one two three", "one"),
        ("alpha", "beta", ""),
    ],
)
def test_an_implicit_text_prompt_holds_whole_words(chosen: str, rejected: str, prompt: str) -> None:
    pair = pair_of("standard", chosen=chosen, rejected=rejected)
    assert pair.prompt == prompt
    assert (prompt + str(pair.chosen), prompt + str(pair.rejected)) == (chosen, rejected)


def test_everything_but_the_last_turn_is_the_prompt() -> None:
    turns = [system("S"), user("1"), assistant("2"), user("3")]
    pair = pair_of(chosen=[*turns, assistant("A")], rejected=[*turns, assistant("B")])
    assert parts_of(pair) == (turns, assistant("A"), assistant("B"))


def test_hh_dialogues_of_several_turns() -> None:
    opening = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello. \n\nHuman: Q"
    pair = pair_of(chosen=f"{opening}\n\nAssistant: A", rejected=f"{opening}\n\nAssistant: B")
    assert pair.prompt == [user("Hi\n\nthere"), assistant("Hello."), user("Q")]


def test_dialogues_that_part_early_have_answers_of_several_turns() -> None:
    chosen = [user("1"), assistant("A"), user("3"), assistant("C")]
    rejected = [user("1"), assistant("B"), user("4"), assistant("D")]
    pair = pair_of(chosen=chosen, rejected=rejected)
    assert parts_of(pair) == ([user("1")], chosen[1:], rejected[1:])
    assert pair.has_several_turns
    shorter = pair_of(chosen=chosen, rejected=rejected[:2])
    assert parts_of(shorter) == ([user("1")], chosen[1:], assistant("B"))
    assert shorter.has_several_turns


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("1"), assistant("A")], [user("2"), assistant("A")]),  # nothing shared
        ([user("1"), assistant("A")], [user("1"), assistant("A"), user("3"), assistant("D")]),
        ([user("1"), user("2")], [user("1"), user("3")]),  # no assistant turn at the end
        ([assistant("A")], [assistant("B")]),  # no prompt at all
    ],
)  # fmt: skip
def test_dialogues_without_a_prompt_that_both_answer_make_no_pair(
    chosen: list[Any], rejected: list[Any]
) -> None:
    found = read_pair(row(chosen=chosen, rejected=rejected), "conversational", "source")
    assert found == NO_SHARED_PROMPT


@pytest.mark.fault(23, "tool and system roles", becomes="kept")
def test_tools_and_tool_turns_are_kept_and_null_keys_are_not() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "42", "tool_call_id": "1", "name": None, "score": 3}
    turns = [user("Q"), call, result]
    schemas = [{"type": "function", "function": {"name": "f"}}]
    for tools in (schemas, json.dumps(schemas)):
        pair = pair_of(
            chosen=[*turns, assistant("A")], rejected=[*turns, assistant("B")], tools=tools
        )
        assert pair.tools == schemas
        assert pair.prompt == [
            user("Q"),
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ]


def test_an_answer_may_be_a_tool_call() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    pair = pair_of(prompt=[user("Q")], chosen=[call], rejected=[assistant("B")])
    assert not pair.has_empty_part


def test_content_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chosen = [{"role": "user", "content": parts}, assistant("A")]
    pair = pair_of(chosen=chosen, rejected=[chosen[0], assistant("B")])
    assert pair.prompt == [user("ab")]
    image = [{"role": "user", "content": [{"type": "image"}]}, assistant("A")]
    assert error_of(chosen=image, rejected=image) == (
        "rows.jsonl:7: chosen[0].content has a part that is of type 'image'; expected parts of "
        "text. Correct or remove the row."
    )


@pytest.mark.fault(
    23,
    "an empty prompt or answer, in five formats",
    becomes="seen as empty, for the gate",
)
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Q", "chosen": " \n", "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": ""},
        {"prompt": " ", "chosen": "A", "rejected": "B"},
        {"question": " ", "system": "S", "chosen": "A", "rejected": "B"},
        {"prompt": [user("Q")], "chosen": [assistant("")], "rejected": [assistant("B")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    ],
)
def test_empty_parts(fields: dict[str, Any]) -> None:
    assert pair_of(**fields).has_empty_part


@pytest.mark.fault(23, "chosen equals the prompt", becomes="noted in the report")
def test_an_answer_that_repeats_the_prompt() -> None:
    assert pair_of(prompt="Q", chosen="A", rejected="Q").answer_repeats_prompt
    assert pair_of(question="Q", chosen="Q", rejected="B").answer_repeats_prompt
    assert not pair_of(question="Q", chosen="A", rejected="B").answer_repeats_prompt
    assert not pair_of(question="", chosen="", rejected="B").answer_repeats_prompt


def test_columns_are_renamed() -> None:
    renamed = rename_columns(row(q="Q", good="A", bad="B", n=1), {"prompt": "q", "chosen": "good"})
    assert renamed == row(bad="B", n=1, prompt="Q", chosen="A")
    with pytest.raises(DataError) as caught:
        rename_columns(row(q="Q", good="A"), {"prompt": "question"})
    assert str(caught.value) == (
        "rows.jsonl:7 has no field 'question' (it has q, good); expected a field 'question' in "
        "every row. Correct or remove the row, or map the column with `columns`."
    )


def test_a_column_map_to_a_name_that_is_not_ours() -> None:
    with pytest.raises(DataError) as caught:
        check_column_map({"answer": "x"}, "data.eval.0")
    assert str(caught.value) == (
        "data.eval.0.columns has 'answer'; expected one of prompt, chosen, rejected, system, "
        "question, response_j, response_k, tools, chosen_score, rejected_score, completion, label, "
        "chat_template_kwargs, responses, scores, ranks, response, score. "
        "Write {our name: the file's name}."
    )


def test_unknown_columns() -> None:
    with pytest.raises(DataError) as caught:
        detect_format(row(q="?", good="a"), "data.train.0")
    assert str(caught.value) == (
        "rows.jsonl:7 has the columns q, good; expected chosen and rejected; question, response_j "
        "and response_k; or responses and scores. Map the file's names, for example "
        "data.train.0.columns={chosen: good, rejected: bad}."
    )


@pytest.mark.fault(23, "a missing key, a null", becomes="named with its row")
def test_a_missing_field_and_a_null() -> None:
    assert error_of("standard", prompt="Q", chosen="A") == (
        "rows.jsonl:7 has no field 'rejected' (it has prompt, chosen); expected a field 'rejected' "
        "in every row. Correct or remove the row, or map the column with `columns`."
    )
    assert error_of("standard", prompt=None, chosen="A", rejected="B") == (
        "rows.jsonl:7: field 'prompt' is null; expected text or messages. Correct or remove "
        "the row."
    )
    assert "field 'chosen' is null" in error_of(chosen=None, rejected="B")


@pytest.mark.fault(23, "a field of the wrong type", becomes="named with its row")
@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"prompt": "Q", "chosen": 3, "rejected": "B"}, "field 'chosen' is a number; "),
        ({"prompt": "Q", "chosen": True, "rejected": "B"}, "field 'chosen' is a boolean; "),
        ({"prompt": "Q", "chosen": "A", "rejected": {"a": 1}}, "field 'rejected' is an object; "),
        ({"prompt": ["Q"], "chosen": "A", "rejected": "B"}, "field 'prompt' is a list; "),
    ],
)
def test_a_field_of_the_wrong_type(fields: dict[str, Any], found: str) -> None:
    assert error_of("standard", **fields) == (
        f"rows.jsonl:7: {found}expected a string. Correct or remove the row."
    )


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (3, "field 'chosen' is a number; expected a list of messages"),
        ([], "field 'chosen' is an empty list; expected a list of messages"),
        (["A"], "chosen[0] is a string; expected a message with role and content"),
        ([{"content": "A"}], "chosen[0] has the role None; expected a message with role and"),
        ([{"role": "user"}], "chosen[0].content is null; expected a string"),
        ([user("Q"), {"role": "assistant", "content": 1}], "chosen[1].content is a number; "),
    ],
)
def test_unusable_messages(chosen: Any, found: str) -> None:
    error = error_of("conversational", chosen=chosen, rejected=[user("Q"), assistant("B")])
    assert error.startswith(f"rows.jsonl:7: {found}")
    assert error.endswith("Correct or remove the row.")


def test_unusable_tools() -> None:
    dialogue = [user("Q"), assistant("A")]
    for tools, found in (("{", "is not JSON"), ({"a": 1}, "is an object")):
        assert error_of(chosen=dialogue, rejected=dialogue, tools=tools) == (
            f"rows.jsonl:7: field 'tools' {found}; expected a list of JSON schemas. "
            "Correct or remove the row."
        )


def test_half_a_character() -> None:
    assert error_of("standard", prompt="Q", chosen="A \ud83d", rejected="B") == (
        "rows.jsonl:7: field 'chosen' holds half a character (\\ud83d); expected whole ones. "
        "Correct or remove the row."
    )


def test_a_text_that_is_no_hh_dialogue() -> None:
    assert error_of("hh", chosen="Once upon a time " * 3, rejected="B") == (
        "rows.jsonl:7: field 'chosen' begins with 'Once upon a time Once upon a time Onc...'; "
        "expected a dialogue that begins with 'Human:'. Correct or remove the row."
    )


DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_rows_of_the_docs_are_of_the_format_they_stand_under() -> None:
    parts = re.split(r"^\*\*`(\w+)`\*\*", DOCS.read_text(), flags=re.MULTILINE)
    shown = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(shown) == set(get_args(PreferenceFormat)) - {"auto"}
    for row_format, section in shown.items():
        examples = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
        assert examples, row_format
        for example in examples:
            fields = json.loads(example)
            if row_format == "labelled":  # never without being asked
                with pytest.raises(DataError, match="Set k.format=labelled"):
                    detect_format(row(**fields), "k")
                continue
            shown_row = rename_columns(row(**fields), implied_columns(row(**fields)))
            assert detect_format(shown_row, "k") == row_format
            if row_format in ("ranked", "scored"):  # not pairs yet: test_ranked_rows.py
                continue
            assert not pair_of(**shown_row.fields).has_empty_part


def test_the_docs_list_every_reason_and_note() -> None:
    text = DOCS.read_text()
    for reason in DROP_REASONS:
        assert f"| `{reason.name}` |" in text
        assert reason.policy is None or f"| `{reason.policy}` |" in text
    assert all(f"`{note}`" in text for note in NOTES)


def test_a_history_that_is_no_list_of_turns() -> None:
    fields = {"instruction": "Q", "chosen": "A", "rejected": "B", "history": ["one"]}
    assert error_of(**fields) == (
        "rows.jsonl:7: history[0] is a string; expected a list of question and answer. Correct or "
        "remove the row."
    )
