"""Where the ranks of a job meet: FAULTS 10."""

import os
import socket

import pytest
from support.ranks import run_ranks, started_ranks

from dpo_dist.engine.distributed import collectives
from dpo_dist.run.topology import from_environment

pytestmark = pytest.mark.timeout(300)


def joined(port: int | None) -> list[int]:
    """The ranks of the group that this rank is in."""
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    topology = from_environment()
    with collectives.process_group(topology):
        return collectives.gather(topology.rank)


@pytest.mark.fault(
    10, "the port of a job is another process's", becomes="named, and worth a restart"
)
def test_fault_10_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with started_ranks(2, joined, port) as ranks:
            first, _ = ranks.wait(120, grace_s=1)
    assert first.exit_code == 1
    assert (
        f"ClusterError: port {port} of 127.0.0.1 is in use by another process; expected a free "
        "port, at which the ranks meet. This may pass: start the same command again."
        in first.output
    )


@pytest.mark.fault(10, "two jobs on one host at the same time", becomes="each is its own")
def test_fault_10_two_jobs_on_one_host() -> None:
    with started_ranks(2, joined, None) as one:
        assert run_ranks(2, joined, None) == [[0, 1]] * 2
        assert [result.value for result in one.wait(120)] == [[0, 1]] * 2
