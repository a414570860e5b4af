"""Pairs that score no finite number: the others are kept, these are named and can be left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import run_ranks
from support.tiny_run import NUM_EVAL, NUM_TRAIN, make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

pytestmark = pytest.mark.timeout(300)
BAD = (3, 17)


def ids_of(pair: Any) -> list[list[int]]:
    return [ids.tolist() for ids in pair]


def scoring_worker(run_yaml: str, overrides: list[str]) -> list[Any]:
    """The reference pass on a model that gives NaN to two training pairs; (its error, its rows)."""
    from dpo_dist.errors import DPODistError
    from dpo_dist.model_files.of_run import RunModels
    from dpo_dist.reference.contract import scoring_contract, store_root
    from dpo_dist.reference.store import open_store
    from dpo_dist.stages import reference

    config, real = load_config(Path(run_yaml), overrides), reference.score_on_all_ranks
    train = open_pairs(Path(run_yaml).parent / "first", "train")
    bad, error = [ids_of(train.token_ids(index)) for index in BAD], ""

    def score(model: Any, own: Any, token_ids: Any, *args: Any) -> Any:
        indices, scores = real(model, own, token_ids, *args)
        is_bad = [ids_of(token_ids(int(index))) in bad for index in indices]
        return indices, np.where(np.array(is_bad)[:, None], np.float32("nan"), scores)

    reference.score_on_all_ranks = score
    try:
        reference.run(config)
    except DPODistError as caught:
        error = str(caught)
    contract = scoring_contract(RunModels(config), "packed")
    return [error, open_store(store_root(config), contract).num_rows]


@pytest.mark.fault(
    39,
    "NaN for two pairs of 50",
    becomes="48 rows kept, two keys named and left out",
)
def test_truth_15_a_pair_without_finite_numbers_costs_only_itself(tmp_path: Path) -> None:
    run_yaml = make_run(tmp_path)
    config = load_config(run_yaml)
    pairs_dir = prepare.run(config)
    shutil.copytree(pairs_dir, tmp_path / "first")
    train = open_pairs(pairs_dir, "train")
    named = [train.identity(index) for index in BAD]
    results = run_ranks(2, scoring_worker, str(run_yaml), [])
    total = NUM_TRAIN + NUM_EVAL
    for error, rows in results:
        assert rows == total - 2
        first, *lines, remedy = error.splitlines()
        assert first == "the reference log-probs of 2 pairs are not finite:"
        assert sorted(lines) == sorted(f"  {p['key']} ({p['origin']})" for p in named)
        assert remedy == (
            "expected finite numbers; those of the other pairs are kept. Leave these pairs out by "
            "data.leave_out, delete the prepared pairs and run again; or check the reference "
            "weights, or set model.dtype=float32."
        )
    shutil.rmtree(pairs_dir)
    left_out = [f"data.leave_out={json.dumps([p['key'] for p in named])}"]
    prepare.run(load_config(run_yaml, left_out))
    report = json.loads((pairs_dir / "report.json").read_text())
    assert report["splits"]["train"]["dropped"]["left_out"] == 2
    assert run_ranks(2, scoring_worker, str(run_yaml), left_out) == [["", total - 2]] * 2


def test_truth_15_a_key_that_is_no_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare.run(load_config(make_run(tmp_path), [f"data.leave_out=[{'ab' * 16}]"]))
    assert str(error.value) == (
        f"data.leave_out: no pair has the key {'ab' * 16}; expected keys of pairs of this "
        "tokenizer, template and data.max_length. Correct it, or remove it."
    )
