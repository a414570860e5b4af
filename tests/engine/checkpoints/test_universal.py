"""Resumes on another number of ranks, through DeepSpeed's own converter."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.tiny_engine import case_name, checkpoints_of, start_engine, train_step

from dpo_dist.engine.checkpoints import checkpoint
from dpo_dist.engine.checkpoints.commit import verify
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.checkpoints.universal import (
    needs_conversion,
    prepare_universal,
    universal_dir,
)
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import TRAIN_STATE_NAME
from dpo_dist.run.topology import from_environment

# (ZeRO stage, dtype, with adapter); bfloat16 itself depends on the number of ranks by 1e-5
FULL, ADAPTER, STAGE2 = (3, "float32", False), (3, "float32", True), (2, "float32", False)
STAGE0 = (0, "float32", False)
REST = [(2, "float32", True), (1, "float32", False), (1, "float32", True)]
Case = tuple[int, str, bool]


def next_losses(engine: Any) -> list[float]:
    return [train_step(engine, step) for step in (3, 4, 5)]


def saved_by_two(folder: str) -> dict[str, list[float]]:
    """Trains two steps, saves, goes on."""
    losses = {}
    with collectives.process_group(from_environment()):
        for case in (FULL, ADAPTER, STAGE2, STAGE0, *REST):
            stage, dtype, adapter = case
            engine = start_engine(stage, adapter=adapter, dtype=dtype)
            for step in (1, 2):
                train_step(engine, step)
            state = TrainState(2, 12, 0.5, {}, 2, stage)
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            run = checkpoints_of(folder, case_name(*case))
            checkpoint.save(engine, run, state, *probe, keep=2)
            losses[case_name(*case)] = next_losses(engine)
            engine.destroy()
    return losses


def resumed(folder: str, cases: list[Case]) -> dict[str, list[float]]:
    """Continues what two ranks saved on this number of ranks."""
    losses = {}
    with collectives.process_group(from_environment()):
        for case in cases:
            stage, dtype, adapter = case
            step_dir = checkpoints_of(folder, case_name(*case)) / "step-000002"
            convert = checkpoint.needs_conversion(step_dir, torch.distributed.get_world_size())
            assert convert == (stage > 0)
            engine = start_engine(stage, adapter=adapter, dtype=dtype, universal=convert)
            assert checkpoint.load(engine, step_dir, {}).world_size == 2
            losses[case_name(*case)] = next_losses(engine)
            engine.destroy()
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, saved_by_two, str(folder))[0]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(1, [FULL, ADAPTER, STAGE0], id="1rank"),
        pytest.param(3, [FULL, ADAPTER], id="3ranks", marks=pytest.mark.slow),
        pytest.param(1, [STAGE2, *REST], id="1rank-rest", marks=pytest.mark.slow),
        pytest.param(3, [STAGE2, STAGE0, *REST], id="3ranks-rest", marks=pytest.mark.slow),
    ],
)
def test_other_ranks_continue_with_the_same_losses(
    saved: tuple[Path, dict[str, list[float]]], world_size: int, cases: list[Case]
) -> None:
    folder, expected = saved
    for losses in run_ranks(world_size, resumed, str(folder), cases):
        assert set(losses) == {case_name(*case) for case in cases}
        for name, values in losses.items():
            assert values == pytest.approx(expected[name], rel=1e-6), name
            assert len(set(values)) == 3
            # the converted copy is gone, the checkpoint is not
            assert os.listdir(checkpoints_of(folder, name)) == ["step-000002"]


@pytest.fixture
def step_dir(saved: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> Path:
    source = checkpoints_of(saved[0], case_name(*FULL)) / "step-000002"
    target = tmp_path / "checkpoints" / "step-000002"
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_conversion_is_used_again_while_it_is_whole(step_dir: Path) -> None:
    killed = step_dir.parent / ".step-000002.universal.killed"
    killed.mkdir()
    folder = prepare_universal(step_dir)
    assert folder == universal_dir(step_dir) / "step-000002"
    assert not killed.exists()
    verify(universal_dir(step_dir))
    weight = folder / "zero" / "policy.scale" / "fp32.pt"
    first = weight.stat().st_ino, weight.read_bytes()
    assert prepare_universal(step_dir) == folder
    assert (weight.stat().st_ino, weight.read_bytes()) == first
    weight.write_bytes(first[1][:-1] + b"x")
    prepare_universal(step_dir)
    assert weight.read_bytes() == first[1]
    assert sorted(os.listdir(step_dir.parent)) == [".step-000002.universal", "step-000002"]


def test_a_failed_conversion_says_why_and_leaves_nothing(step_dir: Path) -> None:
    shard = step_dir / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        prepare_universal(step_dir)
    text = str(caught.value)
    assert text.startswith(
        f"{step_dir} of 2 ranks could not be converted (the converter ended with 1: RuntimeError: "
    )
    assert text.endswith("Fix this, or continue on 2 ranks.")
    assert os.listdir(step_dir.parent) == ["step-000002"]


def one_blind_rank(folder: str, other: str) -> list[str]:
    """Rank 1 has another disk under the path of the run."""
    with collectives.process_group(from_environment()):
        own = Path(folder if collectives.is_first() else other) / "checkpoints"
        with pytest.raises(CheckpointError) as converting:
            prepare_universal(own / "step-000002")
        engine = start_engine(0, adapter=False)
        probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
        with pytest.raises(CheckpointError) as saving:
            checkpoint.save(engine, own, TrainState(9, 54, 1.0, {}, 2, 0), *probe, keep=2)
    return [str(converting.value), str(saving.value)]


def test_a_rank_that_does_not_see_the_run_folder(step_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "checkpoints" / "step-000002"
    other.mkdir(parents=True)
    (other / TRAIN_STATE_NAME).write_bytes((step_dir / TRAIN_STATE_NAME).read_bytes())
    (first, second) = run_ranks(2, one_blind_rank, str(tmp_path), str(tmp_path / "other"))
    for converting, saving in (first, second):
        assert "rank 1 does not see" in converting
        assert "Put run.dir on a shared file system." in converting
        assert "could not be written (rank 1: " in saving
        assert ".step-000009.partial is not visible, run.dir must be on a shared file" in saving


def test_what_needs_a_conversion(tmp_path: Path) -> None:
    for stage, world_size, expected in ((3, 2, False), (3, 1, True), (1, 3, True), (0, 1, False)):
        state = TrainState(2, 12, 0.5, {}, 2, stage, {})
        (tmp_path / TRAIN_STATE_NAME).write_text(state.to_json())
        assert needs_conversion(tmp_path, world_size) is expected
    assert needs_conversion(None, 1) is False
