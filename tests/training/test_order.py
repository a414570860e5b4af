"""Rows of several answers: pairs of a prompt that share it in training are the same numbers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.tiny_run import WORDS, make_run, metrics_of

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs

SETTINGS = ["train.max_steps=4", "data.train.0.pairs=all", "data.eval.0.pairs=all"]
COUNTS = ("tokens_saved_by_sharing",)


def write_ranked(path: Path, prefix: str, count: int) -> None:
    """Prompts with four scored answers each, which make six pairs."""
    chance = random.Random(prefix)

    def words(low: int, high: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(low, high)))

    rows = [
        {
            "prompt": f"{prefix} {number} {words(6, 12)}",
            "responses": [f"{words(2, 9)} {answer}" for answer in range(4)],
            "scores": [4, 3, 2, 1],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage_worker(stages: list[str], run_yaml: str, overrides: list[str], alone: bool) -> None:
    """The stages; with `alone` every pair has its own prompt and answers, as in plain packing."""
    from dpo_dist.engine.forward.pair_scorer import PairScorer
    from dpo_dist.stages import reference, train

    if alone:
        PairScorer.shares_prompts = property(lambda _: False)  # pyright: ignore
    for name in stages:
        {"reference": reference, "train": train}[name].run(load_config(Path(run_yaml), overrides))


def trained(folder: Path, ranks: int, order: str, *more: str, alone: bool = False) -> Any:
    """Metrics of a run of its own over the pairs in `folder`."""
    from dpo_dist.stages import prepare

    folder.mkdir()
    run_yaml = make_run(folder)
    for split, count in (("train", 10), ("eval", 2)):
        write_ranked(folder / f"{split}.jsonl", split, count)
    overrides = [*SETTINGS, f"data.order={order}", *more]
    prepare.run(load_config(run_yaml, overrides))
    run_ranks(ranks, stage_worker, ["reference", "train"], str(run_yaml), overrides, alone)
    return metrics_of(folder / "out")


def assert_same(one: Any, other: Any) -> None:
    assert len(one) == len(other) > 4
    for left, right in zip(one, other, strict=True):
        # while policy and reference are the same, rounding decides which reward is the larger
        equal = abs(left.get("rewards/margins", 1.0)) < 1e-4
        undecided = {"rewards/accuracies"} if equal else set()
        for name in (left.keys() | right.keys()) - {*COUNTS, *undecided}:
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-5), name


def saved(metrics: Any) -> list[float]:
    """Shares of the tokens of plain sequences that each step did without."""
    return [line["tokens_saved_by_sharing"] for line in metrics if COUNTS[0] in line]


def test_pairs_of_a_prompt_share_it_and_no_number_changes(tmp_path: Path) -> None:
    for order in ("pairs", "prompts"):
        alone = trained(tmp_path / f"{order}-alone", 1, order, alone=True)
        for ranks in (1, 2):
            shared = trained(tmp_path / f"{order}-{ranks}", ranks, order)
            assert_same(shared, alone)
            if ranks == 1:
                assert sum(saved(shared)) > sum(saved(alone)), order
    by_pair, by_prompt = (
        saved(metrics_of(tmp_path / f"{order}-1" / "out")) for order in ("pairs", "prompts")
    )
    assert min(by_prompt) > max(by_pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["train.deepspeed=zero2"],
        ["objective.ld_alpha=0.5"],
        ["objective.loss=[ipo, sft]", "objective.loss_weights=[1.0, 0.5]"],
        ["model.layout=padded"],
        ["adapter.rank=4"],
    ],
    ids=lambda more: more[0],
)
def test_so_it_is_on_three_ranks_with_other_settings(tmp_path: Path, more: list[str]) -> None:
    alone = trained(tmp_path / "alone", 1, "prompts", *more, alone=True)
    assert_same(trained(tmp_path / "shared", 3, "prompts", *more), alone)


def test_pairs_without_keys_of_prompts_can_not_be_ordered_by_them(tmp_path: Path) -> None:
    """As an earlier version prepared them; in the order of pairs they are trained as they were."""
    import pyarrow as pa

    from dpo_dist.data.pairs import DATA_NAME, PART_KEYS
    from dpo_dist.errors import ArtifactError
    from dpo_dist.inputs.work import prepared_work
    from dpo_dist.stages import prepare

    run_yaml = make_run(tmp_path)
    prepare.run(load_config(run_yaml))
    for split in ("train", "eval"):
        path = tmp_path / "out" / "pairs" / split / DATA_NAME
        table = pa.ipc.open_stream(path.read_bytes()).read_all().drop_columns(list(PART_KEYS))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert open_pairs(tmp_path / "out" / "pairs", "train").shared is None
    assert prepared_work(load_config(run_yaml)) is not None
    with pytest.raises(ArtifactError) as caught:
        prepared_work(load_config(run_yaml, ["data.order=prompts"]))
    folder = tmp_path / "out" / "pairs" / "train"
    assert str(caught.value) == (
        f"data.order is prompts, and {folder} was prepared by a version that wrote no keys of "
        "prompts; expected pairs with the columns prompt_key, chosen_key and rejected_key. Delete "
        "the prepared pairs and run `dpo-dist prepare` again, or set data.order to pairs."
    )
