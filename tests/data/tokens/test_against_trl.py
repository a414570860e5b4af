"""Ids are those of TRL's own preparation, or differ for a reason that is listed and checked."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.oracles.shipped_templates import templates
from support.oracles.trl_preparation import Case, Fields, cases
from support.oracles.trl_reasons import REASONS, reasons_of
from support.prepared import REAL_DATA, REAL_MODEL, needs_real
from support.tiny_tokenizer import make_tokenizer, sentencepiece_like

from dpo_dist.data.rows.table_rows import TableRows
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.data.tokens.tokenize import TokenPair

TEMPLATES = templates()
DOCS = Path(__file__).parents[3] / "docs" / "data.md"
NOTHING_SHARED = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
SOME_TEMPLATES = (
    "chatml", "llama3_1", "qwen3", "gemma3", "gptoss", "phi3", NOTHING_SHARED,
)  # fmt: skip
TOOLS = [{
    "type": "function",
    "function": {
        "name": "getweather", "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}]  # fmt: skip


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def shapes(seed: int) -> Iterator[tuple[str, Fields]]:
    """A row of every shape, by name; all words of a row are different."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9))

    def user() -> dict[str, Any]:
        return turn("user", word())

    def said(**more: Any) -> dict[str, Any]:
        return turn("assistant", word(), **more)

    def call(arguments: Callable[[Any], Any] = dict, **more: Any) -> dict[str, Any]:
        function = {"name": "getweather", "arguments": arguments({"city": word()})}
        calls = [{"type": "function", "function": function}]
        return {"role": "assistant", **more, "tool_calls": calls}

    def tool() -> dict[str, Any]:
        return turn("tool", word(), name="getweather")

    def row(prompt: Any, chosen: Any, rejected: Any = None, **more: Any) -> Fields:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected or [said()], **more}

    def dialogues(chosen: list[Any], rejected: list[Any], **more: Any) -> Fields:
        return {"chosen": chosen, "rejected": rejected, **more}

    text, asked, again = word(), user(), said()
    yield "text", row(text, " " + word(), " " + word())
    yield "text with a space before the answer", row(text + " ", word(), word())
    yield "text, implied", dialogues([], []) | {"chosen": text + " yes", "rejected": text + " no"}
    begun = f"{text} {word()}"
    yield "text, implied, cut in a word", {"chosen": begun + "abc", "rejected": begun + "xyz"}
    yield "conversation", row([user()], [said()])
    yield "conversation, implied", dialogues([asked, said()], [asked, said()])
    yield "several turns", row([user(), said(), user()], [said()])
    yield (
        "several turns, implied",
        dialogues([asked, again, user_ := user(), said()], [asked, again, user_, said()]),
    )
    yield "system", row([turn("system", word()), user()], [said()])
    yield "developer", row([turn("developer", word()), user()], [said()])
    yield "system column", row([user()], [said()], system=word())
    yield "tools", row([user(), call(content=""), tool()], [said()], tools=TOOLS)
    yield "tools as text", row([user()], [said()], tools=json.dumps(TOOLS))
    yield "a call", row([user()], [call()], tools=TOOLS)
    yield "a call as text", row([user()], [call(json.dumps, content="")], tools=TOOLS)
    yield "a trajectory", row([user()], [call(content=""), tool(), said()], tools=TOOLS)
    yield "an answer of turns", row([user()], [said(), user(), said()])
    yield "a thought", row([user()], [said(reasoning_content=word())])
    yield "an earlier thought", row([user(), said(reasoning_content=word()), user()], [said()])
    yield (
        "thoughts in an answer",
        row([user()], [said(reasoning_content=word()), user(), said(reasoning_content=word())]),
    )
    yield "a prefix", row([user(), said()], [said()])
    yield "a prefix of turns", row([user(), said()], [said(), user(), said()])
    yield "parts", row([turn("user", [{"type": "text", "text": word()}])], [said()])
    yield "a variable", row([user()], [said()], chat_template_kwargs={"enable_thinking": False})
    yield "a variable as text", row([user()], [said()], chat_template_kwargs="{}")
    yield "a prompt that is repeated", row([asked], [asked, said()], [asked, said()])
    yield "a text prompt", row(text, [asked, said()], [asked, said()])
    sharegpt = [{"from": "gpt", "value": word()} for _ in range(2)]
    human = {"from": "human", "value": word()}
    yield "sharegpt", {"conversations": [human], "chosen": sharegpt[0], "rejected": sharegpt[1]}
    yield (
        "parted in the user's turn",
        dialogues([asked, again, user(), said()], [asked, again, user(), said()]),
    )
    yield "answers that begin alike", row([user()], [again, asked, said()], [again, asked, said()])
    yield "nothing shared", dialogues([user(), said()], [user(), said()])
    yield "one longer than the other", dialogues([asked, again, user(), said()], [asked, again])
    spaced = {**asked, "content": asked["content"] + " "}
    yield "a space more", dialogues([asked, said()], [spaced, said()])
    yield "a critic", row([user(), turn("critic", word())], [said()])


def texts() -> Iterator[tuple[Any, Fields]]:
    """Plain texts for tokenizers that add something of their own."""
    row = {"prompt": "The sky", "chosen": " is blue.", "rejected": " is no."}
    for added in ("", "bos", "eos"):
        tokenizer = sentencepiece_like("always", added)
        yield tokenizer, row
        yield tokenizer, {**row, "prompt": "<s>The sky"}
    tokenizer = sentencepiece_like("first", "bos")
    yield tokenizer, {"prompt": "The sk", "chosen": "y is blue.", "rejected": " is no."}
    tokenizer.eos_token = None
    yield tokenizer, row


def typed_table(tokenizer: Any) -> list[Case]:
    """Calls with different arguments: in a table each has the arguments of all."""
    rows = []
    for arguments in ({"city": "lisbon"}, {"day": "monday"}):
        calls = [{"type": "function", "function": {"name": "getweather", "arguments": arguments}}]
        answer = turn("assistant", "wait", tool_calls=calls)
        rows.append({
            "prompt": [turn("user", "whatnow")], "chosen": [answer],
            "rejected": [turn("assistant", "no")], "tools": json.dumps(TOOLS),
        })  # fmt: skip
    table = Dataset.from_list(rows)
    read = [row.fields for row in TableRows(table, "rows.parquet").read(range(len(table)))]
    return cases(tokenizer, read, list(table))


def generated(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Case]]:
    """Every shape with every template, a typed table, and the tokenizers of `texts`."""
    model_dir = make_tokenizer(folder / "model")
    for number, name in enumerate(names):
        tokenizer: Any = load_tokenizer(model_dir, TEMPLATES.get(name, name))
        shape_names, rows = zip(*shapes(number), strict=True)
        found = zip(shape_names, cases(tokenizer, rows), strict=True)
        for shape, case in (*found, *(("a table", case) for case in typed_table(tokenizer))):
            yield f"{shape}, {name[:20]}", case
    for tokenizer, row in texts():
        yield "text, another tokenizer", cases(tokenizer, [row])[0]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME_TEMPLATES, id="some templates"),
        pytest.param((*TEMPLATES, NOTHING_SHARED), id="all", marks=pytest.mark.slow),
    ],
)
def test_generated_rows_differ_for_every_reason_and_for_no_other(
    names: Sequence[str], tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()
    for where, case in generated(names, tmp_path):
        try:
            counts.update(reasons_of(case) or ["equal"])
        except AssertionError as error:
            raise AssertionError(where) from error
    assert counts.keys() == {"equal", *REASONS}
    assert counts["equal"] >= 12 * len(names)


def question_of(better: str, worse: str) -> Callable[[Fields], Fields]:
    """A question and two texts, as one writes them for TRL to apply the chat template."""

    def row_of(row: Fields) -> Fields:
        system = [turn("system", row["system"])] if row.get("system") else []
        answers = {"chosen": row[better], "rejected": row[worse]}
        return {
            "prompt": [*system, turn("user", row["question"])],
            **{name: [turn("assistant", answer)] for name, answer in answers.items()},
        }

    return row_of


def answers_of(row: Fields) -> Fields:
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def whole_texts_of(row: Fields) -> Fields:
    return {name: row["prompt"] + str(text) for name, text in answers_of(row).items()}


# file: the rows as we are given them, and as TRL is
REAL_ROWS: dict[str, tuple[Callable[[Fields], Fields], Callable[[Fields], Fields]]] = {
    "ultrafeedback_binarized": (dict, answers_of),
    "orca_dpo_pairs": (dict, question_of("chosen", "rejected")),
    "stack_exchange_paired": (dict, question_of("response_j", "response_k")),
    "llmbar": (dict, dict),
    "llmbar without its prompts": (whole_texts_of, whole_texts_of),
}

MERGED = "tokens that merge across prompt and answer"
REAL_REASONS = {name: set[str]() for name in REAL_ROWS} | {
    "llmbar": {MERGED},
    "llmbar without its prompts": {"plain texts without a `prompt`", MERGED},
}


@needs_real
@pytest.mark.parametrize("count", [50, pytest.param(None, marks=pytest.mark.slow, id="all")])
@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_rows(name: str, count: int | None) -> None:
    tokenizer: Any = load_tokenizer(Path(str(REAL_MODEL)), None)
    lines = (Path(str(REAL_DATA)) / f"{name.split()[0]}.jsonl").read_text().splitlines()[:count]
    rows, trl_rows = (
        [as_given(json.loads(line)) for line in lines] for as_given in REAL_ROWS[name]
    )
    found = cases(tokenizer, rows, trl_rows)
    reasons = Counter(reason for case in found for reason in reasons_of(case))
    assert reasons.keys() == REAL_REASONS[name]
    assert sum(reasons.values()) < len(found) / 4


def test_a_difference_that_no_reason_explains_fails(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(make_tokenizer(tmp_path), None)
    (case,) = cases(tokenizer, [dict(shapes(0))["conversation"]])
    assert reasons_of(case) == [] and isinstance(case.ours, TokenPair)
    for other in (
        replace(case.ours, prompt_ids=case.ours.prompt_ids[1:]),
        replace(case.ours, chosen_ids=case.ours.chosen_ids[:-1]),
        replace(case.ours, rejected_ids=[*case.ours.rejected_ids, 1]),
        replace(case.ours, chosen_ids=[~token for token in case.ours.chosen_ids]),
        replace(case.ours, lost="content of the answer"),
        "it does not know the role 'user'",
    ):
        with pytest.raises(AssertionError):
            reasons_of(replace(case, ours=other))


def test_the_reasons_are_those_of_the_docs() -> None:
    section = DOCS.read_text().partition("\n## Compared with TRL\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(REASONS)
    assert {len(row) for row in rows} == {3}
