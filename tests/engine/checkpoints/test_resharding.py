"""Resumes on another number of ranks: the same numbers, and nothing is read twice."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.tiny_engine import case_name, checkpoints_of, start_engine, train_step

from dpo_dist.engine.checkpoints import checkpoint, saving
from dpo_dist.engine.checkpoints.resharding import needs_resharding
from dpo_dist.engine.checkpoints.shard_reader import MOMENTS
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError
from dpo_dist.run.manifest import digest_of
from dpo_dist.run.run_dir import TRAIN_STATE_NAME
from dpo_dist.run.topology import from_environment

# (ZeRO stage, dtype, with adapter); bfloat16 itself depends on the number of ranks by 1e-5
FULL, ADAPTER, STAGE2 = (3, "float32", False), (3, "float32", True), (2, "float32", False)
STAGE0 = (0, "float32", False)
REST = [(2, "float32", True), (1, "float32", False), (1, "float32", True)]
Case = tuple[int, str, bool]
Found = tuple[dict[str, list[float]], dict[str, dict[str, str]]]  # losses and vectors, by case
WIDTH, DEPTH = 192, 8  # 300,000 parameters


def next_losses(engine: Any) -> list[float]:
    return [train_step(engine, step) for step in (3, 4, 5)]


def vectors_of(engine: Any) -> dict[str, str]:
    """The digest of every parameter and of its moments, gathered from all ranks."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and engine.zero_optimization_stage():
            vectors = [
                deepspeed.utils.safe_get_full_fp32_param(parameter),
                *(deepspeed.utils.safe_get_full_optimizer_state(parameter, m) for m in MOMENTS),
            ]
            found[name] = digest_of([vector.tolist() for vector in vectors])
    return found


def saved_by_two(folder: str) -> Found:
    """Trains two steps, saves, goes on."""
    losses, vectors = {}, {}
    with collectives.process_group(from_environment()):
        for case in (FULL, ADAPTER, STAGE2, STAGE0, *REST):
            stage, dtype, adapter = case
            engine = start_engine(stage, adapter=adapter, dtype=dtype)
            for step in (1, 2):
                train_step(engine, step)
            state = TrainState(2, 12, 0.5, {}, 2, stage)
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            run = checkpoints_of(folder, case_name(*case))
            saving.save(engine, run, state, *probe, keep=2)
            vectors[case_name(*case)] = vectors_of(engine)
            losses[case_name(*case)] = next_losses(engine)
            engine.destroy()
    return losses, vectors


def resumed(folder: str, cases: list[Case]) -> Found:
    """Continues what two ranks saved on this number of ranks."""
    losses, vectors = {}, {}
    with collectives.process_group(from_environment()):
        for case in cases:
            stage, dtype, adapter = case
            step_dir = checkpoints_of(folder, case_name(*case)) / "step-000002"
            reshard = checkpoint.needs_resharding(step_dir, torch.distributed.get_world_size())
            assert reshard == (stage > 0)
            engine = start_engine(stage, adapter=adapter, dtype=dtype, universal=reshard)
            assert checkpoint.load(engine, step_dir, {}).world_size == 2
            vectors[case_name(*case)] = vectors_of(engine)
            losses[case_name(*case)] = next_losses(engine)
            engine.destroy()
    return losses, vectors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, saved_by_two, str(folder))[0]


@pytest.mark.fault(
    16,
    "a checkpoint of 2 ranks on 1 and on 3",
    becomes="weights to the bit, the same losses",
)
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
    saved: tuple[Path, Found], world_size: int, cases: list[Case]
) -> None:
    folder, (expected, vectors) = saved
    for losses, own_vectors in run_ranks(world_size, resumed, str(folder), cases):
        assert set(losses) == {case_name(*case) for case in cases}
        for name, values in losses.items():
            assert values == pytest.approx(expected[name], rel=1e-6), name
            assert len(set(values)) == 3
            assert own_vectors[name] == vectors[name], "to the bit"
            # no copy was made
            assert os.listdir(checkpoints_of(folder, name)) == ["step-000002"]


def saved_by_one(folder: str) -> None:
    """A checkpoint of some megabytes for each stage."""
    with collectives.process_group(from_environment()):
        for stage in (2, 3):
            engine = start_engine(stage, adapter=False, width=WIDTH, depth=DEPTH)
            train_step(engine, 1)
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            state = TrainState(2, 12, 0.5, {}, 1, stage)
            saving.save(engine, checkpoints_of(folder, str(stage)), state, *probe, keep=2)
            engine.destroy()


def bytes_read(folder: str, stage: int) -> int:
    """What this rank reads to load the checkpoint, as the kernel counts it."""

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar

    with collectives.process_group(from_environment()):
        step_dir = checkpoints_of(folder, str(stage)) / "step-000002"
        engine = start_engine(stage, adapter=False, universal=True, width=WIDTH, depth=DEPTH)
        checkpoint.load(engine, step_dir, {})  # which imports
        before = read_so_far()
        checkpoint.load(engine, step_dir, {})
        return read_so_far() - before


@pytest.fixture(scope="module")
def megabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megabyte")
    run_ranks(1, saved_by_one, str(folder))
    return folder


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_truth_12_each_rank_reads_its_share(megabyte: Path, stage: int, world_size: int) -> None:
    step_dir = checkpoints_of(megabyte, str(stage)) / "step-000002"
    (shard,) = step_dir.glob("*_optim_states.pt")
    size = shard.stat().st_size
    read = run_ranks(world_size, bytes_read, str(megabyte), stage)
    assert 0.9 * size < sum(read) < 1.5 * size, f"{read} of {size}"
    assert max(read) < 1.5 * size / world_size, f"{read} of {size}"
    assert os.listdir(step_dir.parent) == ["step-000002"], "and no copy was made"


def one_blind_rank(folder: str, other: str) -> str:
    """Rank 1 has another disk under the path of the run."""
    with collectives.process_group(from_environment()):
        own = Path(folder if collectives.is_first() else other) / "checkpoints"
        engine = start_engine(0, adapter=False)
        probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
        with pytest.raises(CheckpointError) as caught:
            saving.save(engine, own, TrainState(9, 54, 1.0, {}, 2, 0), *probe, keep=2)
    return str(caught.value)


@pytest.mark.fault(
    11,
    "another disk under the path of the run on rank 1",
    becomes="the save fails on every rank, naming rank 1",
)
def test_a_rank_that_does_not_see_the_run_folder(tmp_path: Path) -> None:
    for error in run_ranks(2, one_blind_rank, str(tmp_path), str(tmp_path / "other")):
        assert "could not be written (rank 1: " in error
        assert ".step-000009.partial is not visible, run.dir must be on a shared file" in error


def test_what_needs_resharding(tmp_path: Path) -> None:
    for stage, world_size, expected in ((3, 2, False), (3, 1, True), (1, 3, True), (0, 1, False)):
        state = TrainState(2, 12, 0.5, {}, 2, stage)
        (tmp_path / TRAIN_STATE_NAME).write_text(state.to_json())
        assert needs_resharding(tmp_path, world_size) is expected
    assert needs_resharding(None, 1) is False
