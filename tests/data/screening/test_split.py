"""Held out by prompt: on one side only, whatever the source, the order or the other rows."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.prepared import WORDS, make_config, needs_real, orca_row, report_of, write_jsonl

from dpo_dist.config.run_config import RunConfig, parse_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.data.screening.held_out import is_held_out
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare


def split_of(config: RunConfig) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The prompts of both sides."""
    folder = prepare.run(config)
    sides = (open_pairs(folder, split) for split in ("train", "eval"))
    train, held_out = ({tuple(p.token_ids(i)[0]) for i in range(len(p))} for p in sides)
    return train, held_out


def many_answers(num_prompts: int) -> list[dict[str, Any]]:
    """Three pairs a prompt, in some order."""
    rows = [orca_row(n, chosen=f"yes {WORDS[k]}") for n in range(num_prompts) for k in range(3)]
    random.Random(0).shuffle(rows)
    return rows


def below(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def test_no_prompt_stands_on_both_sides(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", many_answers(100))
    config = make_config(tmp_path, eval_fraction=0.2)
    train, held_out = split_of(config)
    assert not train & held_out
    assert len(train | held_out) == 100 and 10 <= len(held_out) <= 30
    report = report_of(config)
    pairs = {split: counts["pairs"] for split, counts in report["splits"].items()}
    assert pairs == {"train": 3 * len(train), "eval": 3 * len(held_out)}
    assert report["held_out"] == (
        f"{len(held_out)} of 100 prompts ({len(held_out) / 100:.1%}) with {3 * len(held_out)} of "
        "300 pairs (data.eval_fraction 0.2, data.eval_seed 0)"
    )
    assert list(report["splits"]["eval"]["sources"]) == ["train"]  # per source, by its name


def test_further_rows_move_no_prompt(tmp_path: Path) -> None:
    few, many = below(tmp_path, "few"), below(tmp_path, "many")
    write_jsonl(few / "train.jsonl", many_answers(60))
    write_jsonl(many / "train.jsonl", list(reversed(many_answers(100))))
    (train, held_out), (all_train, all_held_out) = (
        split_of(make_config(folder, eval_fraction=0.3)) for folder in (few, many)
    )
    assert train <= all_train and held_out <= all_held_out


def test_the_seed_changes_the_split_and_the_fraction_only_adds(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(2000)]

    def chosen(fraction: float, seed: int) -> set[str]:
        return {prompt for prompt in prompts if is_held_out(prompt, fraction, seed)}

    assert chosen(0.1, 0) < chosen(0.2, 0) < set(prompts)
    assert 150 < len(chosen(0.1, 0)) < 250
    assert len(chosen(0.1, 0) & chosen(0.1, 1)) < 60
    assert chosen(0.0, 0) == set()
    write_jsonl(tmp_path / "train.jsonl", many_answers(50))
    _, first = split_of(make_config(tmp_path, eval_fraction=0.2))
    other = make_config(tmp_path, eval_fraction=0.2, eval_seed=7)
    other = other.model_copy(update={"run": other.run.model_copy(update={"dir": tmp_path / "o"})})
    assert split_of(other)[1] != first


def test_one_question_in_two_sources_stands_on_one_side(tmp_path: Path) -> None:
    """Also where formats, spacing, capitals or system messages differ."""
    write_jsonl(tmp_path / "a.jsonl", [orca_row(n) for n in range(40)])
    rows = []
    for n in range(40):
        words = orca_row(n)["question"]
        turn = [{"role": "system", "content": "Be brief."}] * (n % 2)
        turn.append({"role": "user", "content": f" {words.upper()}  "})
        answers = {"chosen": f"good {n}", "rejected": "bad"}
        made = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
        rows.append({"prompt": turn, **made})
    write_jsonl(tmp_path / "b.jsonl", rows)
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    report = report_of(make_config(tmp_path, train=sources, eval_fraction=0.3))
    kept = report["splits"]["eval"]["sources"]
    assert kept["a"]["pairs"] == kept["b"]["pairs"] > 0
    assert report["splits"]["eval"]["dropped"]["overlap"] == 0


def test_weights_repeat_training_pairs_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", many_answers(40))
    source = [{"path": str(path), "weight": 3}]
    counts = report_of(make_config(tmp_path, train=source, eval_fraction=0.3))["splits"]
    assert counts["train"]["pairs"] == 3 * counts["train"]["kept"]
    assert counts["eval"]["pairs"] == counts["eval"]["kept"] > 0


def test_held_out_sources_and_a_fraction_go_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", many_answers(40))
    write_jsonl(tmp_path / "eval.jsonl", [orca_row(n) for n in range(200, 206)])
    same = below(tmp_path, "same")
    write_jsonl(same / "train.jsonl", [orca_row(n) for n in range(300, 304)])
    held_out = [{"path": str(tmp_path / "eval.jsonl")}, {"path": str(same / "train.jsonl")}]
    config = make_config(tmp_path, eval=held_out, eval_fraction=0.3)
    counts = report_of(config)["splits"]["eval"]["sources"]
    assert list(counts) == ["train", "eval", "train-2"]
    assert (counts["eval"]["pairs"], counts["train-2"]["pairs"]) == (6, 4)
    assert counts["train"]["pairs"] > 0


@pytest.mark.parametrize(
    ("num_prompts", "fraction", "found", "remedy"),
    [(3, 0.0001, "none of 3", "Raise"), (3, 0.9999, "all of 3", "Lower")],
)
def test_a_fraction_that_leaves_a_side_empty(
    tmp_path: Path, num_prompts: int, fraction: float, found: str, remedy: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", many_answers(num_prompts))
    with pytest.raises(DataError) as caught:
        prepare.run(make_config(tmp_path, eval_fraction=fraction))
    assert str(caught.value) == (
        f"data.eval_fraction {fraction} holds out {found} prompts; expected prompts on both sides. "
        f"{remedy} it, or set data.eval instead."
    )


@needs_real
@pytest.mark.slow
def test_real_prompts_are_split_alike_with_and_without_a_template(tmp_path: Path) -> None:
    data, model = os.environ["DPO_DIST_REAL_DATA"], os.environ["DPO_DIST_REAL_MODEL"]
    sides: list[set[str]] = []
    for number, template in enumerate((None, "chatml")):
        config = parse_config(
            {
                "run": {"dir": str(tmp_path / str(number))},
                "model": {"path": model},
                "data": {
                    "train": [
                        {"path": f"{data}/{name}.jsonl"}
                        for name in ("ultrafeedback_binarized", "orca_dpo_pairs", "llmbar")
                    ],
                    "max_length": 2048,
                    "chat_template": template,
                    "eval_fraction": 0.1,
                },
            }
        )
        folder = prepare.run(config)
        report = json.loads((folder / "report.json").read_text())
        assert report["splits"]["eval"]["dropped"]["overlap"] == 0
        train, held_out = (open_pairs(folder, split) for split in ("train", "eval"))
        assert set(held_out.sources) == {"ultrafeedback_binarized", "orca_dpo_pairs", "llmbar"}
        assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
        sides.append({held_out.origin(index) for index in range(len(held_out))})
    assert len(sides[0] & sides[1]) >= 0.97 * len(sides[0])  # lengths drop a few, no more
