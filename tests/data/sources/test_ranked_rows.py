"""Rows of several answers with scores or ranks: their shapes, their pairs, and what is refused."""

import itertools
import json
import random
from collections import Counter
from typing import Any, get_args

import pytest

from dpo_dist.config.data_section import PairChoice
from dpo_dist.data.rows.formats import detect_format, read_pair, rename_columns
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row
from dpo_dist.data.sources.ranked_rows import choose_pairs, pair_rows, read_prompt
from dpo_dist.errors import DataError

CHOICES: tuple[PairChoice, ...] = get_args(PairChoice)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ultrafeedback(prompt: str, scores: list[float]) -> dict[str, Any]:
    completions = [
        {
            "annotations": {"helpfulness": {"Rating": "4", "Rationale": "It helps."}},
            "custom_system_prompt": "You are a helpful assistant.",
            "model": f"model-{index}",
            "principle": "helpfulness",
            "response": f"answer {index}",
            "critique": "Good.",
            "fine-grained_score": 3.5,
            "overall_score": score,
        }
        for index, score in enumerate(scores)
    ]
    return {
        "source": "sharegpt", "instruction": prompt, "models": ["a", "b"],
        "completions": completions, "correct_answers": ["None"], "incorrect_answers": ["None"],
    }  # fmt: skip


def nectar(prompt: str, ranks: list[float]) -> dict[str, Any]:
    answers = [
        {"answer": f"answer {index}", "model": f"model-{index}", "rank": rank}
        for index, rank in enumerate(ranks)
    ]
    return {
        "prompt": f"\n\nHuman: {prompt} \n\nAssistant: ", "answers": answers, "turns": 1,
        "num_responses": len(ranks), "source": ["sharegpt"], "good_natured": True,
    }  # fmt: skip


def plain(prompt: Any, scores: list[Any], **others: Any) -> dict[str, Any]:
    texts = [f"answer {index}" for index in range(len(scores))]
    return {"prompt": prompt, "responses": texts, "scores": scores, **others}


def pairs_in(choice: PairChoice, fields: dict[str, Any]) -> list[Pair]:
    row = Row(fields, "rows.jsonl:7")
    assert detect_format(row, "data.train.0") == "ranked"
    found = [read_pair(one, "ranked", "source") for one in pair_rows(row, choice)]
    return [pair for pair in found if isinstance(pair, Pair)]


def indices_of(pairs: list[Pair]) -> list[tuple[int, int]]:
    """Which answers are paired, by the numbers in their texts."""
    sides = [(pair.chosen[0], pair.rejected[0]) for pair in pairs]
    return [tuple(int(turn["content"].split()[-1]) for turn in side) for side in sides]  # pyright: ignore


def error_of(fields: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        pairs_in("all", fields)
    return str(caught.value)


PAIRS: dict[PairChoice, list[tuple[int, int]]] = {  # of answers with the scores 5, 9, 1, 7
    "best_vs_worst": [(1, 2)],
    "best_vs_rest": [(1, 3), (1, 0), (1, 2)],
    "adjacent": [(1, 3), (3, 0), (0, 2)],
    "all": [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)],
}
KINDS = [
    ultrafeedback("Q", [5, 9, 1, 7]),
    ultrafeedback("Q", [5, 9, 1, 7]) | {"instruction": None, "prompt": "Q"},
    nectar("Q", [3.0, 1.0, 4.0, 2.0]),
    plain("Q", [5, 9, 1, 7]),
    plain([user("Q")], [5.0, 9.0, 1.0, 7.0]),
    {"prompt": "Q", "completions": [f"answer {n}" for n in range(4)], "scores": [5, 9, 1, 7]},
    {"prompt": "Q", "responses": [f"answer {n}" for n in range(4)], "ranks": [3, 1, 4, 2]},
    {
        "prompt": "Q",
        "responses": [[user("Q"), assistant(f"answer {n}")] for n in range(4)],
        "scores": [5, 9, 1, 7],
    },
    {
        "messages": [user("Q")],
        "answers": [assistant(f"answer {n}") | {"score": s} for n, s in enumerate((5, 9, 1, 7))],
    },
    {
        "prompt": "Q",
        "completions": [
            {"text": [{"from": "gpt", "value": f"answer {n}"}], "score": str(s)}
            for n, s in enumerate((5, 9, 1, 7))
        ],
    },
    {  # as a CSV file holds it
        "prompt": "Q",
        "responses": json.dumps([f"answer {n}" for n in range(4)]),
        "scores": "[5, 9, 1, 7]",
    },
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("fields", KINDS)
def test_every_kind_of_row_and_every_choice(fields: dict[str, Any], choice: PairChoice) -> None:
    if "messages" in fields:
        fields = {**fields, "prompt": fields["messages"]}
    pairs = pairs_in(choice, fields)
    assert indices_of(pairs) == PAIRS[choice]
    for pair in pairs:
        assert pair.prompt == [user("Q")] and not pair.has_several_turns
        assert (pair.source, pair.origin) == ("source", "rows.jsonl:7")


def test_the_prompt_of_several_turns_and_what_stands_beside_it() -> None:
    text = "\n\nHuman: Hi \n\nAssistant: Hello. \n\nHuman: Q \n\nAssistant: "
    turns = [user("Hi"), assistant("Hello."), user("Q")]
    assert read_prompt(Row({"prompt": text}, "x:1")) == turns
    assert read_prompt(Row({"prompt": "Human: Q"}, "x:1")) == [user("Human: Q")]
    asked = {"instruction": "Q", "input": "of this", "system": "S"}
    system = {"role": "system", "content": "S"}
    assert read_prompt(Row(asked, "x:1")) == [system, user("Q\nof this")]
    kwargs = {"enable_thinking": False}
    (pair,) = pairs_in(
        "best_vs_worst", plain(turns, [1, 2], system="S", chat_template_kwargs=kwargs)
    )
    assert pair.prompt == [system, *turns] and pair.template_kwargs == kwargs


TIED = [7.0, 9.0, 7.0, 9.0, 1.0]


def test_equal_scores_make_no_pair_and_the_first_stands_for_all() -> None:
    assert choose_pairs(TIED, "best_vs_worst") == [(1, 4)]
    assert choose_pairs(TIED, "best_vs_rest") == [(1, 0), (1, 2), (1, 4)]
    assert choose_pairs(TIED, "adjacent") == [(1, 0), (0, 4)]
    assert len(choose_pairs(TIED, "all")) == 5 * 4 / 2 - 1 - 1
    for choice in CHOICES:
        for scores in ([], [3.0], [3.0, 3.0]):
            assert choose_pairs(scores, choice) == []


def test_as_many_pairs_as_the_docs_say() -> None:
    draw = random.Random(0)
    for _ in range(500):
        scores = [float(draw.randint(0, 6)) for _ in range(draw.randint(0, 9))]
        tied = Counter(scores).values()
        count, distinct = len(scores), len(tied)
        best = Counter(scores)[max(scores)] if scores else 0
        expected = {
            "best_vs_worst": min(distinct - 1, 1) if distinct else 0,
            "best_vs_rest": count - best,
            "adjacent": max(distinct - 1, 0),
            "all": count * (count - 1) / 2 - sum(t * (t - 1) / 2 for t in tied),
        }
        for choice in CHOICES:
            pairs = choose_pairs(scores, choice)
            assert len(set(pairs)) == len(pairs) == expected[choice], (choice, scores)
            assert all(scores[better] > scores[worse] for better, worse in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (plain("Q", [1, 2]) | {"scores": [1, 2, 3]},
         "2 responses and 3 scores; expected a score for each answer."),
        (plain("Q", [1, 2]) | {"scores": None, "ranks": [1]},
         "2 responses and 1 ranks; expected a rank for each answer."),
        (plain("Q", [1, "high"]), "scores[1] is 'high'; expected a number."),
        (plain("Q", [1, None]), "scores[1] is null; expected a number."),
        (plain("Q", [True, 1]), "scores[0] is a boolean; expected a number."),
        (plain("Q", [1, float("nan")]), "scores[1] is nan; expected a number."),
        (plain("Q", [1, float("inf")]), "scores[1] is inf; expected a number."),
        (plain("Q", [1, 2]) | {"scores": 3}, "field 'scores' is a number; expected a list."),
        (plain("Q", [1, 2]) | {"scores": "3 or 4"},
         "field 'scores' is text; expected a list, as JSON."),
        (plain("Q", [1, 2]) | {"responses": {"a": "b"}},
         "field 'responses' is an object; expected a list."),
        (plain("Q", [1, 2]) | {"responses": None}, "field 'responses' is null; expected text or "
         "messages."),
        (plain("Q", [1, 2]) | {"responses": ["a", 3]},
         "field 'responses[1]' is a number; expected a list of messages."),
        (plain("Q", [1, 2]) | {"responses": ["a", None]},
         "field 'responses[1]' is null; expected text or messages."),
        (plain("Q", [1, 2]) | {"scores": None}, "responses[0] has no score; expected overall_score,"
         " score, helpfulness or rank in each answer, or a column scores or ranks."),
        (ultrafeedback("Q", [5, 6]) | {"completions": [{"response": "a", "overall_score": 5},
                                                       {"response": "b"}]},
         "completions[1] has no overall_score; expected overall_score in each answer, or a column "
         "scores or ranks."),
        (ultrafeedback("Q", [5, float("nan")]),
         "completions[1].overall_score is nan; expected a number."),
        ({"prompt": "Q", "answers": [{"reply": "a", "rank": 1}]},
         "answers[0] has reply, rank; expected an answer under response, answer, completion, text "
         "or content."),
        ({"prompt": 3, "responses": ["a"], "scores": [1]},
         "field 'prompt' is a number; expected a list of messages."),
    ],
)  # fmt: skip
def test_an_unusable_row(fields: dict[str, Any], message: str) -> None:
    assert error_of(fields) == f"rows.jsonl:7: {message} Correct or remove the row."


def test_two_answers_of_the_same_rank() -> None:
    assert error_of(nectar("Q", [1.0, 2.0, 2.0])) == (
        "rows.jsonl:7: 2 answers have rank 2; expected another rank for each answer, 1 for the "
        "best. Correct or remove the row, or give scores, of which equal ones make no pair."
    )


def test_a_row_without_a_prompt() -> None:
    assert error_of({"responses": ["a", "b"], "scores": [1, 2]}) == (
        "rows.jsonl:7 has no field 'prompt' (it has responses, scores); expected a field 'prompt' "
        "in every row. Correct or remove the row, or map the column with `columns`."
    )


def test_other_names_of_the_columns() -> None:
    fields = {"query": "Q", "outputs": ["answer 0", "answer 1"], "rewards": [0.1, 0.9]}
    names = {"prompt": "query", "responses": "outputs", "scores": "rewards"}
    assert indices_of(pairs_in("all", dict(rename_columns(Row(fields, "x:1"), names).fields))) == [
        (1, 0)
    ]


def test_every_pair_is_once_in_all() -> None:
    scores = [3.0, 1.0, 2.0]
    both = {frozenset(pair) for pair in choose_pairs(scores, "all")}
    assert both == set(map(frozenset, itertools.combinations(range(3), 2)))
