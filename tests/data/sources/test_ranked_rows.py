"""Rows of several answers with scores or ranks: their shapes, their pairs, and what is refused."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prepared import make_config, make_model, pairs_of, report_of, write_jsonl

from dpo_dist.config.data_section import PairChoice
from dpo_dist.data.rows.formats import detect_format, read_pair, rename_columns
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row
from dpo_dist.data.sources.ranked_rows import choose_pairs, pair_rows, read_prompt
from dpo_dist.errors import ArtifactError, DataError
from dpo_dist.stages import prepare

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which one is all tied, one has one answer, and one is close."""
    folder = tmp_path_factory.mktemp("ranked")
    make_model(folder)
    rows = [
        *(plain(f"question {number}", [5, 9, 1, 7]) for number in range(8)),
        plain("tied", [3, 3]),
        plain("alone", [3]),
        plain("close", [3, 3.5]),
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def config_of(folder: Path, name: str, source: dict[str, Any] | None = None, **data: Any) -> Any:
    train = [{"path": str(folder / "rows.jsonl"), "min_score_margin": 1} | (source or {})]
    config = make_config(folder, train=train, **{"max_dropped": 0.9, "num_workers": 1} | data)
    run = config.run.model_copy(update={"dir": folder / name})
    return config.model_copy(update={"run": run})


@pytest.mark.parametrize("choice", CHOICES)
def test_prepared_pairs_and_rows_that_make_none_are_counted(
    folder: Path, choice: PairChoice
) -> None:
    config = config_of(folder, choice, {"pairs": choice})
    report, pairs = report_of(config)["splits"]["train"], pairs_of(config)
    dropped = {name: count for name, count in report["dropped"].items() if count}
    made = 8 * len(PAIRS[choice])
    assert dropped == {"no_preference": 2, "low_margin": 1}
    assert (report["rows"], report["pairs"], len(pairs)) == (made + 3, made, made)
    assert report["sources"]["rows"]["format"] == "ranked"
    path = folder / "rows.jsonl"
    assert report["first"]["no_preference"] == f"{path}:9"
    assert report["first"]["low_margin"] == f"{path}:11"
    lines = Counter(pairs.origin(index) for index in range(made))
    assert lines == {f"{path}:{line}": len(PAIRS[choice]) for line in range(1, 9)}


def test_limit_weight_and_held_out_prompts(folder: Path) -> None:
    chosen = {"pairs": "all", "limit": 4, "weight": 2}
    assert len(pairs_of(config_of(folder, "weighted", chosen))) == 4 * 6 * 2
    thinned = pairs_of(config_of(folder, "thinned", {"pairs": "all", "limit": 4, "weight": 0.5}))
    assert {thinned.origin(index)[-2:] for index in range(len(thinned))} == {":1", ":3"}
    assert len(thinned) == 12
    config = config_of(folder, "held", {"pairs": "all"}, eval_fraction=0.5)
    sides = [pairs_of(config, split) for split in ("train", "eval")]
    lines = [Counter(side.origin(index) for index in range(len(side))) for side in sides]
    assert not lines[0].keys() & lines[1].keys() and len(lines[0]) + len(lines[1]) == 8
    assert {*lines[0].values(), *lines[1].values()} == {6}


def test_duplicates_and_conflicts_are_found_between_pairs_of_rows(tmp_path: Path) -> None:
    rows = [plain("Q", [9, 5, 1]), plain("Q", [9, 5, 1]), plain("Q", [9, 1, 5])]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}], max_dropped=0.9)
    report = report_of(config)["splits"]["train"]
    dropped = {name: count for name, count in report["dropped"].items() if count}
    # 1 > 2 and 2 > 1 contradict each other in all three rows; the others repeat the first row's
    assert dropped == {"conflict": 3, "duplicate": 4} and report["pairs"] == 2


def test_a_bad_row_counts_once(tmp_path: Path) -> None:
    rows = [plain(f"question {number}", [5, 9, 1, 7]) for number in range(4)]
    rows[2]["tools"] = "{"  # of every pair
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"path": str(path), "pairs": "all"}
    bad = {"on_bad_row": "drop", "max_bad_rows": 0.25}
    report = report_of(make_config(tmp_path, train=[source], **bad))["splits"]["train"]
    assert report["dropped"]["bad_row"] == 1 and report["pairs"] == 3 * 6
    with pytest.raises(DataError, match=r"data.max_bad_rows = 24.00% of 4 rows"):
        prepare.run(make_config(tmp_path / "b", train=[source], **bad | {"max_bad_rows": 0.24}))


def test_parquet_and_a_stream_give_what_json_lines_give(folder: Path) -> None:
    rows = [
        *(ultrafeedback(f"question {number}", [5, 9, 1, 7]) for number in range(4)),
        ultrafeedback("more", [1, 2]),
    ]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train.parquet")
    write_jsonl(folder / "uf.jsonl", rows)
    sources = [
        {"path": str(folder / "uf.jsonl")},
        {"path": str(folder / "data" / "train.parquet")},
        {"path": str(folder / "data"), "streaming": True},
    ]
    digests = {
        pairs_of(config_of(folder, f"kind{number}", source | {"pairs": "adjacent"})).digest
        for number, source in enumerate(sources)
    }
    assert len(digests) == 1


def test_pairs_made_before_the_key_came_stay_current(folder: Path) -> None:
    config = config_of(folder, "earlier")
    manifest = prepare.run(config) / "MANIFEST.json"
    assert "pairs" not in json.loads(manifest.read_text())["settings"]["train"]["0"]
    with pytest.raises(ArtifactError, match='train.0.pairs: null -> "all"'):
        prepare.run(config_of(folder, "earlier", {"pairs": "all"}))


def test_a_preview_shows_as_many_pairs_as_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.preview(config_of(folder, "preview", {"pairs": "all", "min_score_margin": None}), 3)
    shown = capsys.readouterr().out
    assert shown.count(f"rows, ranked, {folder}/rows.jsonl:1\n") == 3
    assert shown.count("chosen, ") == 3


def test_pairs_of_rows_that_are_pairs_already(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, train=[{"path": str(path), "pairs": "all"}]))
    assert str(caught.value) == (
        f"data.train.0.pairs is all, but {path} has two answers in each row; expected rows of "
        "several answers, with a score or a rank for each. Remove data.train.0.pairs."
    )


def test_every_pair_is_once_in_all() -> None:
    scores = [3.0, 1.0, 2.0]
    both = {frozenset(pair) for pair in choose_pairs(scores, "all")}
    assert both == set(map(frozenset, itertools.combinations(range(3), 2)))
