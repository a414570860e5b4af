"""A mixture of sources from rows to the evaluation of the export: counted and judged apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.commands import succeed
from support.prepared import make_config, orca_row, write_jsonl
from support.tiny_run import make_run, metrics_of, write_rows

from dpo_dist.data.pairs import open_pairs
from dpo_dist.inputs.scored_pairs import ScoredPairs
from dpo_dist.stages import prepare


def test_groups_of_pairs_by_source(tmp_path: Path) -> None:
    names = ("b", "a")
    for number, name in enumerate(names):
        rows = [orca_row(10 * number + n) for n in range(3 - number)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in names]
    pairs = open_pairs(prepare.run(make_config(tmp_path, train=sources)), "train")
    scored = ScoredPairs(pairs, torch.zeros(len(pairs), 2))
    found = {suffix: rows.tolist() for suffix, rows in scored.by_source(np.array([4, 1, 3, 0]))}
    assert found == {"": [0, 1, 2, 3], "/a": [0, 2], "/b": [1, 3]}
    alone = list(scored.by_source(np.array([0, 1])))
    assert [suffix for suffix, _ in alone] == [""]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mixture_is_trained_together_and_judged_apart(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    write_rows(tmp_path / "other.jsonl", "other", 30)
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    config["data"]["train"] = [
        {"path": str(tmp_path / "train.jsonl"), "limit": 30, "name": "ours"},
        {"path": str(tmp_path / "other.jsonl"), "weight": 2},
    ]
    del config["data"]["eval"]
    config["data"]["eval_fraction"] = 0.3
    config |= {"adapter": {"rank": 4}}
    path.write_text(yaml.safe_dump(config))
    succeed("run", path)

    out = tmp_path / "out"
    report = json.loads((out / "pairs" / "report.json").read_text())["splits"]
    counts = {
        split: {name: source["pairs"] for name, source in report[split]["sources"].items()}
        for split in ("train", "eval")
    }
    assert counts["train"]["ours"] + counts["eval"]["ours"] == 30
    assert counts["train"]["other"] + 2 * counts["eval"]["other"] == 60

    last = [line for line in metrics_of(out) if "eval_loss" in line][-1]
    evaluated = json.loads(succeed("evaluate", path, "--json").stdout)["after"]
    total = sum(counts["eval"].values())
    for metric in ("rewards/accuracies", "rewards/margins"):
        apart = [last[f"eval_{metric}/{name}"] for name in counts["eval"]]
        weighted = np.average(apart, weights=list(counts["eval"].values()))
        assert last[f"eval_{metric}"] == pytest.approx(weighted, abs=1e-6)
        for name, number in counts["eval"].items():
            means = evaluated["per_source"][name]
            assert means["num_pairs"] == number and evaluated["num_pairs"] == total
            assert means[metric] == pytest.approx(last[f"eval_{metric}/{name}"], abs=2e-2)
    assert apart[0] != apart[1]
