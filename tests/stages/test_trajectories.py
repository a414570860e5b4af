"""Agents' trajectories through a whole run: tool calls are scored, what the tool says is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles.plain_forward import plain_scores
from support.ranks import ROOT
from support.tiny_run import make_run, metrics_of, succeed_on

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import complete_store
from dpo_dist.run.run_dir import RunDir
from dpo_dist.stages import prepare
from examples.agent_trajectories.make_rows import make_rows

TEMPLATE = ROOT / "examples" / "agent_trajectories" / "tools.jinja"
SETTINGS = [
    f"data.chat_template={TEMPLATE}", "data.max_length=auto", "train.micro_batch_tokens=2048",
    "train.max_steps=2", "checkpoint.every_steps=2", "reference.micro_batch_tokens=2048",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run on rows of the example, with the model's positions to hold them."""
    folder = tmp_path_factory.mktemp("trajectories")
    path = make_run(folder)
    rows = make_rows(0, 30)
    for split, part in (("train", rows[:24]), ("eval", rows[24:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model_config = folder / "model" / "config.json"
    changed = json.loads(model_config.read_text()) | {"max_position_embeddings": 4096}
    model_config.write_text(json.dumps(changed))
    prepare.run(load_config(path, SETTINGS))
    return path


def pairs_of(run_yaml: Path) -> Pairs:
    return open_pairs(RunDir(load_config(run_yaml, SETTINGS).run.dir).pairs_dir, "train")


def scored_text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode([token for token in ids if token >= 0])


def test_the_tools_words_are_read_and_the_agents_scored(run_yaml: Path) -> None:
    pairs = pairs_of(run_yaml)
    tokenizer: Any = load_tokenizer(run_yaml.parent / "model", TEMPLATE.read_text())
    assert len(pairs) == 24
    several = 0
    for index in range(len(pairs)):
        _, chosen, rejected = pairs.token_ids(index)
        text = scored_text(tokenizer, chosen)
        assert "<call>" in text and "There are" in text and '"stock":' not in text
        assert '"stock":' in tokenizer.decode([token if token >= 0 else ~token for token in chosen])
        assert '"stock":' not in scored_text(tokenizer, rejected)
        assert pairs.chosen_lengths[index] == sum(token >= 0 for token in chosen)
        several += min(rejected) < 0
    assert 0 < several < 24
    report = json.loads((pairs.folder.parent / "report.json").read_text())
    assert report["splits"]["train"]["noted"]["several_turns"] == 24


@pytest.mark.slow
def test_a_whole_run(run_yaml: Path, tmp_path: Path) -> None:
    """The reference is a plain forward with the same mask; one rank trains as two do."""
    config = load_config(run_yaml, SETTINGS)
    succeed_on(2, "reference", run_yaml, *SETTINGS)
    pairs = pairs_of(run_yaml)
    held = complete_store(RunModels(config), pairs.keys)
    assert held is not None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_yaml.parent / "model", dtype=torch.float32)
    with torch.no_grad():
        plain = plain_scores(model, [pairs.token_ids(index) for index in range(len(pairs))])
    assert np.abs(held[1].lookup(pairs.keys) - plain.numpy()).max() < 1e-3
    succeed_on(2, "train", run_yaml, *SETTINGS)
    two_ranks = [line for line in metrics_of(config.run.dir) if "loss" in line]
    for stage in ("export", "verify", "evaluate"):
        succeed_on(1, stage, run_yaml, *SETTINGS)
    assert json.loads((config.run.dir / "verify.json").read_text())["passed"]
    # padded, on one rank
    padded = ["model.layout=padded", f"reference.store_dir={tmp_path / 'store'}"]
    other = [*SETTINGS, *padded, f"run.dir={tmp_path / 'other'}"]
    for stage in ("prepare", "reference", "train"):
        succeed_on(1, stage, run_yaml, *other)
    one_rank = [line for line in metrics_of(tmp_path / "other") if "loss" in line]
    for ours, theirs in zip(two_ranks, one_rank, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
