"""The step-0 gate, and training of a model whose positions depend on the length."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.ranks import run_ranks
from support.tiny_run import make_run, metrics_of

from dpo_dist.config.run_config import load_config
from dpo_dist.data.batches import plan_micro_batches, step_pair_indices
from dpo_dist.data.pairs import open_pairs
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import complete_store
from dpo_dist.reference.store import open_store

ONE_STEP = ["train.max_steps=1", "checkpoint.probe_pairs=2", "train.warmup_ratio=0"]
LENGTH = 52  # positions; some pairs of a tiny run are longer


def stage_worker(names: list[str], run_yaml: str, overrides: list[str]) -> None:
    from dpo_dist.stages import reference, train

    for name in names:
        {"reference": reference, "train": train}[name].run(load_config(Path(run_yaml), overrides))


def prepared(folder: Path, family: str) -> Path:
    from dpo_dist.stages import prepare

    run_yaml = make_run(folder, family)
    prepare.run(load_config(run_yaml))
    return run_yaml


def test_truth_02_the_first_loss_is_ln_2_whatever_the_packing(tmp_path: Path) -> None:
    run_yaml = prepared(tmp_path, "phi3_longrope")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["original_max_position_embeddings"] = LENGTH
    config["rope_parameters"]["original_max_position_embeddings"] = LENGTH
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    pairs = open_pairs(tmp_path / "out" / "pairs", "train")
    answers = np.maximum(pairs.chosen_lengths, pairs.rejected_lengths)
    longest = pairs.prompt_lengths + answers
    assert 4 < (longest > LENGTH).sum() < 36, "pairs on both sides"
    alone = f"reference.micro_batch_tokens={pairs.packed_lengths.max()}"
    stages = ["reference", "train"]
    run_ranks(2, stage_worker, stages, str(run_yaml), [*ONE_STEP, alone])
    first, *_ = metrics_of(tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.fault(40, "a pair that another one moves", becomes="stopped at the step-0 gate")
def test_truth_02_the_gate_looks_at_every_micro_batch(tmp_path: Path) -> None:
    run_yaml = prepared(tmp_path, "llama")
    overrides = [*ONE_STEP, "train.micro_batch_tokens=100"]
    run_ranks(1, stage_worker, ["reference"], str(run_yaml), overrides)
    config = load_config(run_yaml, overrides)
    pairs = open_pairs(tmp_path / "out" / "pairs", "train")
    step = step_pair_indices(0, len(pairs), config.train.global_batch_size, config.run.seed)
    (batches,) = plan_micro_batches(pairs.packed_lengths, step, 1, 100)
    changed = batches[-1].pair_indices[-1]
    held = complete_store(RunModels(config), pairs.keys)
    assert len(batches) > 2 and held is not None
    rows, contract = held[1].lookup(pairs.keys), held[1].contract
    rows[changed, 1] += 1.0
    other = tmp_path / "changed"
    open_store(other, contract).append(pairs.keys, rows, np.arange(len(pairs)))
    kept = open_pairs(tmp_path / "out" / "pairs", "eval").keys
    open_store(other, contract).append(kept, held[1].lookup(kept), np.arange(len(kept)))
    with pytest.raises(Exception, match=f"step-0 gate: pair {changed} scores "):
        run_ranks(
            1, stage_worker, ["train"], str(run_yaml),
            [*overrides, f"reference.store_dir={other}"],
        )  # fmt: skip
