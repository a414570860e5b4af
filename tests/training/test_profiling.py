"""Diagnosis of training: a trace of some steps, and kernels that repeat themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_run import make_run, same_training, succeed_on

from dpo_dist.config.run_config import load_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there."""
    path = make_run(tmp_path_factory.mktemp("profile"))
    succeed_on(1, "prepare", path)
    succeed_on(1, "reference", path)
    return path


def worker(run_yaml: str, overrides: list[str]) -> bool:
    """Trains; whether only deterministic kernels were allowed then."""
    from dpo_dist.stages import train

    train.run(load_config(Path(run_yaml), overrides))
    return torch.are_deterministic_algorithms_enabled()


def trained(run_yaml: Path, name: str, *overrides: str) -> tuple[Path, list[Any]]:
    out = run_yaml.parent / name
    out.mkdir()
    for part in ("pairs", "reference"):
        (out / part).symlink_to(run_yaml.parent / "out" / part)
    settings = ["train.max_steps=4", "eval.every_steps=100", f"run.dir={out}", *overrides]
    return out, run_ranks(2, worker, str(run_yaml), settings)


@pytest.mark.slow
def test_a_trace_of_every_rank_and_the_same_training(run_yaml: Path) -> None:
    plain, deterministic = trained(run_yaml, "plain")
    assert deterministic == [False, False]
    out, deterministic = trained(
        run_yaml, "traced", "train.profile_steps=[2,3]", "train.deterministic=true"
    )
    assert deterministic == [True, True]
    same_training(plain, out, 4)
    assert not (plain / "profile").exists()
    sizes = []
    for rank in range(2):
        trace = json.loads((out / "profile" / f"rank{rank:04d}.trace.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        sizes.append(sum(name == "ScorePairs" or "mm" in str(name) for name in names))
        assert any("gloo:all_reduce" in str(name) for name in names), "collectives are in it"
    assert min(sizes) > 0


def test_training_that_ends_inside_the_profile_still_writes_it(run_yaml: Path) -> None:
    out, _ = trained(run_yaml, "short", "train.profile_steps=[4,9]")
    assert json.loads((out / "profile" / "rank0000.trace.json").read_text())["traceEvents"]
