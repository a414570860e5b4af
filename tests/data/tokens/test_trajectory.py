"""Answers of several messages: the assistant's turns are scored, what comes between is read."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.keys.data_settings import data_settings
from support.oracles.shipped_templates import templates
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.data.drop_reasons import NOTE_BITS, SEVERAL_TURNS
from dpo_dist.data.rows.formats import detect_format, read_pair
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair

TEMPLATES = templates()
TOOLS = [{
    "type": "function",
    "function": {
        "name": "getweather", "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}]  # fmt: skip


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str, **more: Any) -> dict[str, Any]:
    function = {"name": "getweather", "arguments": {"city": city}}
    return turn("assistant", None, tool_calls=[{"type": "function", "function": function}], **more)


# name: the answer, the words that are scored, and those that are read
SHAPES: dict[str, tuple[list[dict[str, Any]], list[str], list[str]]] = {
    "tool": (
        [call("lisbon"), turn("tool", "sunny", name="getweather"), turn("assistant", "goodday")],
        ["lisbon", "goodday"], ["sunny"],
    ),
    "two tools": (
        [
            call("lisbon"), turn("tool", "sunny", name="getweather"),
            call("madrid"), turn("tool", "cloudy", name="getweather"), turn("assistant", "goodday"),
        ],
        ["lisbon", "madrid", "goodday"], ["sunny", "cloudy"],
    ),
    "user": (
        [turn("assistant", "hithere"), turn("user", "andthen"), turn("assistant", "goodday")],
        ["hithere", "goodday"], ["andthen"],
    ),
    "thoughts": (
        [
            turn("assistant", "hithere", reasoning_content="firstthought"), turn("user", "andthen"),
            turn("assistant", "goodday", reasoning_content="lastthought"),
        ],
        ["hithere", "goodday"], ["andthen"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, to be loaded with each template."""
    return make_tokenizer(tmp_path_factory.mktemp("model"))


def encoded(tokenizer: Any, fields: dict[str, Any]) -> TokenPair | TemplateRefusal:
    row = Row(fields, "rows.jsonl:7")
    pair = read_pair(row, detect_format(row, "data.train.0"), "rows")
    assert isinstance(pair, Pair)
    (found,) = PairTokenizer(tokenizer, data_settings()).encode([pair])
    return found


def texts(tokenizer: Any, ids: list[int]) -> list[tuple[bool, str]]:
    """Runs of an answer: whether it is scored, and its text."""
    runs = itertools.groupby(ids, lambda token: token >= 0)
    return [(on, tokenizer.decode([t if on else ~t for t in run])) for on, run in runs]


def row_of(answer: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    prompt = [turn("user", "whatnow")]
    return {"prompt": prompt, "chosen": answer, "rejected": [turn("assistant", "no")], **more}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_assistants_turns_are_scored_and_nothing_else(name: str, model_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(model_dir, TEMPLATES[name])
    outcomes: dict[str, str] = {}
    for shape, (answer, scored, read) in SHAPES.items():
        tools = {"tools": TOOLS} if "tool" in shape else {}
        found = encoded(tokenizer, row_of(answer, **tools))
        if isinstance(found, TemplateRefusal) or found.lost:
            outcomes[shape] = str(found if isinstance(found, TemplateRefusal) else found.lost)
            continue
        runs = texts(tokenizer, found.chosen_ids)
        assert [on for on, _ in runs] == [n % 2 == 0 for n in range(len(runs))]
        ours, others = ("\n".join(t for on, t in runs if on is kind) for kind in (True, False))
        assert all(word in ours and word not in others for word in scored), (shape, runs)
        assert all(word in others and word not in ours for word in read), (shape, runs)
        assert "tool" not in shape or "getweather" in ours
        assert found.notes & NOTE_BITS[SEVERAL_TURNS]
        outcomes[shape] = "scored"
    if not name.startswith(("idefics", "llava", "smolvlm")):
        assert outcomes["user"] == "scored", outcomes


def test_what_is_scored_of_a_turn(model_dir: Path) -> None:
    """From behind the header to the end of the turn, as of a single answer."""
    tokenizer: Any = load_tokenizer(model_dir, TEMPLATES["chatml"])
    found = encoded(tokenizer, row_of(SHAPES["user"][0]))
    assert isinstance(found, TokenPair)
    assert texts(tokenizer, found.chosen_ids) == [
        (True, "hithere<|im_end|>\n"),
        (False, "<|im_start|>user\nandthen<|im_end|>\n<|im_start|>assistant\n"),
        (True, "goodday<|im_end|>\n"),
    ]
    assert texts(tokenizer, found.rejected_ids) == [(True, "no<|im_end|>\n")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared", "lengths"),
    [
        ("uaua", "uaub", "uau", (1, 1)),
        ("uaua", "ubub", "u", (3, 3)),
        ("ucta", "ucsb", "u", (3, 3)),  # they part in the tool's word: the call is scored on both
        ("uctctb", "uca", "u", (5, 2)),
        ("uava", "uaua", "u", (3, 3)),  # in the user's
    ],
)
def test_the_prompt_is_what_both_share(
    chosen: str, rejected: str, shared: str, lengths: tuple[int, int]
) -> None:
    turns = {
        "u": turn("user", "one"), "v": turn("user", "two"), "a": turn("assistant", "three"),
        "b": turn("assistant", "four"), "c": call("rome"), "t": turn("tool", "five"),
        "s": turn("tool", "six"),
    }  # fmt: skip
    fields = {
        name: [dict(turns[letter]) for letter in letters]
        for name, letters in (("chosen", chosen), ("rejected", rejected))
    }
    pair = read_pair(Row(fields, "x:1"), "conversational", "s")
    assert isinstance(pair, Pair)
    assert len(pair.prompt) == len(shared)
    assert (len(pair.chosen), len(pair.rejected)) == lengths
