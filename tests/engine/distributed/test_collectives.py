"""The exchanges between ranks, on real ranks."""

import datetime
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks, started_ranks, wait_until

from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import DataError, DPODistError
from dpo_dist.run.topology import from_environment

BUFFERS = Path("/dev/shm")


def refuse() -> None:
    raise DataError("found this", "that", "Do so.")


def exchange() -> dict[str, Any]:
    import torch

    topology = from_environment()
    with collectives.process_group(topology):
        error = None
        try:
            collectives.on_first(refuse)
        except DataError as caught:
            error = str(caught)
        return {
            "broadcast": collectives.broadcast(topology.rank + 7),
            "gather": collectives.gather(topology.rank),
            "sum": collectives.sum_over_ranks(torch.tensor([topology.rank, 0.5])).tolist(),
            "first": collectives.is_first(),
            "on first": collectives.on_first(lambda: topology.rank + 5),
            "tensor": send_rows(topology.rank),
            "error": error,
        }


def send_rows(rank: int) -> list[Any]:
    """A tensor in pieces, the last of them smaller; sent where it lies, and as bytes alone."""
    import torch

    sending = collectives.PIECE
    collectives.PIECE = 4
    try:
        tensor = torch.arange(10.0).view(5, 2) if rank == 0 else torch.zeros(5, 2)
        sent = collectives.broadcast_tensor(tensor)
        return [sent.data_ptr() == tensor.data_ptr(), sent.tolist()]
    finally:
        collectives.PIECE = sending


class NeedsMore(ValueError):
    """Pickles, and cannot be made again from its text alone."""

    def __init__(self, text: str, *, response: int) -> None:
        super().__init__(text)
        self.response = response


def fail_on_first(kind: str) -> list[Any]:
    """What each rank is told of an error of rank 0 that does not travel."""

    class OwnError(DataError):
        """Has no name that another process could look up."""

    errors = {
        "keyword": NeedsMore("the real reason", response=500),
        "handle": OSError("the real reason", threading.Lock()),
        "user": OwnError("the real reason", "that", "Do so."),
    }

    def work() -> None:
        raise errors[kind]

    with collectives.process_group(from_environment()):
        try:
            collectives.on_first(work)
        except Exception as caught:
            return [isinstance(caught, DataError), str(caught)]
    return []


def wait_for_ever(folder: str) -> None:
    import time

    topology = from_environment()
    with collectives.process_group(topology):
        Path(folder, str(topology.rank)).touch()
        time.sleep(600)


def buffers() -> set[str]:
    return {path.name for path in BUFFERS.glob("deepspeed_allreduce_buffer_*")}


def test_exchanges_between_three_ranks() -> None:
    results = run_ranks(3, exchange)
    for rank, result in enumerate(results):
        assert result == {
            "broadcast": 7,
            "gather": [0, 1, 2],
            "sum": [3.0, 1.5],
            "first": rank == 0,
            "on first": 5,
            "tensor": [True, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]],
            "error": "found this; expected that. Do so.",
        }


@pytest.mark.fault(
    37,
    "three exceptions that do not pickle",
    becomes="every rank is told name and text",
)
@pytest.mark.parametrize("kind", ["keyword", "handle", "user"])
def test_truth_14_an_error_that_does_not_pickle_is_the_one_told_on_every_rank(kind: str) -> None:
    told = run_ranks(2, fail_on_first, kind, timeout_s=30)
    assert [is_users for is_users, _ in told] == [kind == "user"] * 2, told
    assert all("the real reason" in text for _, text in told), told
    if kind == "keyword":
        assert told[1][1] == "NeedsMore: the real reason"


def test_without_a_group_a_process_is_alone() -> None:
    assert collectives.broadcast(3) == 3
    assert collectives.gather("x") == ["x"]
    assert collectives.is_first()


def environments() -> list[bool]:
    """Whether the environment is the same behind a group as before, and whether it was inside."""
    topology = from_environment()
    for name in topology.environment():
        del os.environ[name]
    before = dict(os.environ)
    with collectives.process_group(topology):
        inside = dict(os.environ) == before
    return [dict(os.environ) == before, inside]


def test_a_group_leaves_the_environment_as_it_was() -> None:
    """With RANK in it, a command that this process starts would take itself for a rank."""
    assert run_ranks(1, environments) == [[True, False]]


def test_killed_ranks_leave_no_shared_memory_behind(tmp_path: Path) -> None:
    before = buffers()
    with started_ranks(2, wait_for_ever, str(tmp_path)) as ranks:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        assert buffers() <= before
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGKILL)
    assert buffers() <= before


def test_a_killed_build_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    killed, running = (tmp_path / name / "lock" for name in ("py311_cpu/killed", "running"))
    for lock in (killed, running):
        lock.parent.mkdir(parents=True)
        lock.touch()
    long_ago = time.time() - 2 * collectives.BUILD_S
    os.utime(killed, (long_ago, long_ago))
    collectives.remove_stale_build_locks()
    assert not killed.exists() and running.exists()


def slow_files(seconds: float, limit_s: float, fail: bool) -> str:
    """Rank 1 works on files for longer than the group waits for one exchange."""
    collectives.TIMEOUT = datetime.timedelta(seconds=2)

    def work() -> int:
        rank, _ = collectives.place()
        time.sleep(seconds * rank)
        if fail and rank:
            raise DataError("a file", "none", "Do.")
        return rank

    with collectives.process_group(from_environment()):
        try:
            return str(collectives.polled(work, limit_s, "read its files"))
        except DPODistError as error:
            return str(error)


@pytest.mark.fault(
    37,
    "files slower than the limit of a collective",
    becomes="waited for, up to a limit of their own",
)
def test_truth_12_slow_files_are_waited_for_in_short_exchanges() -> None:
    assert run_ranks(2, slow_files, 4.0, 60.0, False) == ["[0, 1]"] * 2
    assert run_ranks(2, slow_files, 0.0, 60.0, True) == ["a file; expected none. Do."] * 2
    assert run_ranks(2, slow_files, 60.0, 1.0, False) == [
        "rank 1 did not read its files within 1 s (1 ranks); expected a file system that answers. "
        "Look at that node and its file system, then start the same command again."
    ] * 2  # fmt: skip
