"""Checkpoints that are written while training goes on: the same files, the same faults."""

import contextlib
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faults.limits import limited
from support.ranks import run_ranks, started_ranks
from support.tiny_engine import case_name, checkpoints_of, start_engine, train_step

from dpo_dist.engine.checkpoints import checkpoint, host_copies, saving
from dpo_dist.engine.checkpoints.commit import verify
from dpo_dist.engine.checkpoints.host_copies import HostCopies, num_tensor_bytes
from dpo_dist.engine.checkpoints.shard_writer import ShardWriter
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives, memory
from dpo_dist.errors import CheckpointError
from dpo_dist.run.topology import from_environment

# (ZeRO stage, dtype, with adapter)
CASES = [(3, "float32", False), (3, "bfloat16", True), (2, "bfloat16", False), (0, "float32", True)]


def begun_at(engine: Any, run: Path, step: int, copies: HostCopies | None) -> saving.Saving:
    _, world_size = collectives.place()
    state = TrainState(step, 6 * step, step / 4, {}, world_size, engine.zero_optimization_stage())
    logps = np.array([[-1.5, -2.5]], dtype=np.float32)
    return saving.begin(engine, run, state, np.array([0]), logps, copies)


class Held:
    """Writers that wait until they are let go: training overtakes them for certain."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        own = ShardWriter.catch_up

        def waits(writer: ShardWriter) -> None:
            self.gate.wait(60)
            own(writer)

        patch.setattr(ShardWriter, "catch_up", waits)


def are_same(folder: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same files with equal numbers of the same types."""
    names = verify(folder).keys()
    return names == verify(other).keys() and all(
        equal(*(torch.load(each / name, weights_only=False) for each in (folder, other)))
        if name.endswith(".pt")
        else (folder / name).read_bytes() == (other / name).read_bytes()
        for name in names
    )


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        # NaN is what it was: DeepSpeed never sets the memory that pads a ZeRO-3 partition
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(((a == b) | ((a != a) & (b != b))).all())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dict__") and not isinstance(a, type):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return bool(a == b)


def both_ways(folder: str) -> dict[str, list[bool]]:
    """Each case saved before and behind, twice: are all files the same?"""
    same: dict[str, list[bool]] = {}
    with collectives.process_group(from_environment()), pytest.MonkeyPatch.context() as patch:
        held = Held(patch)
        for case in CASES:
            stage, dtype, adapter = case
            engine, copies = start_engine(stage, adapter=adapter, dtype=dtype), HostCopies(2)
            before, behind = (checkpoints_of(folder, f"{case_name(*case)}-{w}") for w in "ab")
            for step in (1, 2):
                train_step(engine, step)
                expected = begun_at(engine, before, step, None).commit(keep=2)
                under_way = begun_at(engine, behind, step, copies)
                assert not under_way.is_written
                train_step(engine, step + 10)  # changes every weight and moment
                assert not (behind / f"step-{step:06d}").exists()
                held.gate.set()
                committed = under_way.commit(keep=2)
                held.gate.clear()
                assert under_way.is_written
                same.setdefault(case_name(*case), []).append(are_same(committed, expected))
            engine.destroy()
    return same


def test_what_is_written_behind_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    first, second = run_ranks(2, both_ways, str(tmp_path))
    assert first == second == {case_name(*case): [True, True] for case in CASES}


def failing_behind(folder: str) -> tuple[str, list[str]]:
    """A file that grows too large on one rank, behind; then one more checkpoint."""
    with collectives.process_group(from_environment()):
        engine, run, copies = start_engine(3, adapter=False), Path(folder), HostCopies(2)
        begun_at(engine, run, 1, copies).commit(keep=2)
        train_step(engine, 1)
        second = not collectives.is_first()
        with limited(resource.RLIMIT_FSIZE, 2000) if second else contextlib.nullcontext():
            under_way = begun_at(engine, run, 2, copies)
            train_step(engine, 2)  # nobody waits for the rank that failed
            with pytest.raises(CheckpointError) as caught:
                under_way.commit(keep=2)
        begun_at(engine, run, 3, copies).commit(keep=2)
        return str(caught.value), sorted(os.listdir(run))


@pytest.mark.fault(
    15,
    "a file limit on one rank, behind training",
    becomes="all ranks give the reason; that checkpoint only",
)
def test_fault_15_a_write_that_fails_behind_is_told_by_all_and_costs_that_checkpoint_only(
    tmp_path: Path,
) -> None:
    run = tmp_path / "checkpoints"
    first, second = run_ranks(2, failing_behind, str(run))
    assert first == second
    error, left = first
    shard = run / ".step-000002.partial" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert error == (
        f"{run}/.step-000002.partial could not be written (rank 1: {shard}: File too large); "
        "expected a writable folder with free space. Fix this and start again: training continues "
        "from the checkpoint before."
    )
    assert left == ["step-000001", "step-000003"]


def bug_behind(folder: str) -> str:
    """What is no failure of a disk, in the background of one rank."""
    with collectives.process_group(from_environment()), pytest.MonkeyPatch.context() as patch:
        engine = start_engine(3, adapter=False)
        if not collectives.is_first():
            patch.setattr(ShardWriter, "catch_up", lambda _: 1 / 0)
        under_way = begun_at(engine, Path(folder), 1, HostCopies(2))
        with pytest.raises(ZeroDivisionError) as caught:
            under_way.commit(keep=2)
        return str(caught.value)


@pytest.mark.fault(
    5,
    "an exception in the background of one rank",
    becomes="raised on every rank; nothing is committed",
)
def test_fault_05_any_error_behind_ends_all_ranks(tmp_path: Path) -> None:
    told = run_ranks(2, bug_behind, str(tmp_path / "checkpoints"))
    assert told == ["division by zero"] * 2
    assert checkpoint.newest_committed(tmp_path / "checkpoints") is None


def killed_behind(folder: str) -> None:
    """One rank dies while all write behind."""
    with collectives.process_group(from_environment()), pytest.MonkeyPatch.context() as patch:
        engine, run = start_engine(3, adapter=False), Path(folder)
        begun_at(engine, run, 1, HostCopies(2)).commit(keep=2)
        Held(patch)
        begun_at(engine, run, 2, HostCopies(2))
        train_step(engine, 2)
        if not collectives.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(engine, 3)


@pytest.mark.fault(
    2,
    "SIGKILL of rank 1 while both write behind training",
    becomes="the checkpoint before is taken; the other rank leaves",
)
def test_fault_02_killed_while_it_is_written_behind(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    with started_ranks(2, killed_behind, str(run)) as ranks:
        results = ranks.wait(60)
    assert [result.exit_code for result in results] == [1, -signal.SIGKILL]
    assert checkpoint.newest_committed(run) == run / "step-000001"
    assert (run / ".step-000002.partial").exists()


def without_room(folder: str) -> bool:
    with collectives.process_group(from_environment()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies, "free_host_bytes", lambda: 10)
        under_way = begun_at(start_engine(3, adapter=False), Path(folder), 1, HostCopies(2))
        shards = list(under_way.partial.glob("*_states.pt"))
        under_way.commit(keep=2)
        return len(shards) == 2 * collectives.place()[1]


def test_without_room_for_copies_shards_are_written_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (at_once,) = run_ranks(1, without_room, str(tmp_path / "checkpoints"))
    assert at_once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies, "free_host_bytes", lambda: 10 * 2**30)
        copies = HostCopies(8)
        assert copies.have_room("optim_states", 2**30)
        assert not copies.have_room("model_states", 2 * 2**30)
        assert not copies.have_room("model_states", 1)  # decided once
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "checkpoints are written before training goes on: 8 ranks of this host x 2.00 GiB of "
        "model_states to copy, 8.00 GiB of memory free"
    )


def test_a_storage_that_tensors_share_counts_once() -> None:
    flat = torch.zeros(100)
    state = {"a": [flat[:10], flat[10:]], "b": {"c": (torch.zeros(5),)}, "step": 3}
    assert num_tensor_bytes(state) == 4 * 105


def test_memory_that_a_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory.free_host_bytes()
    assert free > 2**28
    own = Path("/proc/self/cgroup").read_text().split("0::")[-1].splitlines()[0].lstrip("/")
    group = tmp_path / own
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.free_host_bytes() == 1_500_000
    (group / "memory.max").write_text("max\n")
    assert memory.free_host_bytes() > 2**28
