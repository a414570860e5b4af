"""Which device each rank uses: the rule, what is refused, and real ranks that disagree."""

import os
from typing import Any

import pytest
from support.ranks import started_ranks

from dpo_dist.engine.distributed import collectives, devices
from dpo_dist.errors import ClusterError
from dpo_dist.run.topology import from_environment


@pytest.mark.parametrize(
    ("gpus", "local_rank", "local_world_size", "ordinal"),
    [
        (8, 3, 8, 3), (8, 1, 2, 1), (1, 0, 1, 0),
        (1, 3, 4, 0),  # a launcher that shows each rank its own
        (2, 3, 4, None), (2, 0, 4, None), (0, 0, 1, None),
    ],
)  # fmt: skip
def test_truth_08_a_rank_has_this_of_the_gpus_that_it_sees(
    gpus: int, local_rank: int, local_world_size: int, ordinal: int | None
) -> None:
    assert devices.ordinal_of(gpus, local_rank, local_world_size) == ordinal


def claim(host: str, local_rank: int, gpus: int, gpu: str | None) -> devices.Claim:
    return devices.Claim(host=host, local_rank=local_rank, local_world_size=2, gpus=gpus, gpu=gpu)


def test_truth_08_claims_that_fit_together() -> None:
    devices.refuse_claims([claim("a", 0, 2, "u0"), claim("a", 1, 2, "u1")])
    devices.refuse_claims([claim("a", 0, 1, "u0"), claim("a", 1, 1, "u1")])  # one visible each
    devices.refuse_claims([claim("a", 0, 0, None), claim("b", 0, 0, None)])


@pytest.mark.fault(35, "more ranks than GPUs", becomes="refused")
def test_truth_08_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ClusterError) as error:
        devices.refuse_claims([claim("a", 0, 1, "u0"), claim("a", 1, 1, "u0")])
    assert str(error.value) == (
        "rank 1 on a sees 1 GPUs, of which none is left for it (local rank 1 of 2); expected as "
        "many GPUs on a node as ranks. Start fewer ranks a node, or correct what the launcher "
        "shows them (CUDA_VISIBLE_DEVICES)."
    )


def join(odd_rank: int) -> str:
    """Rank 1 of a real job claims a GPU, as all but a rank with a broken driver would."""
    topology = from_environment()
    if topology.rank == odd_rank:
        own = devices.own_claim(topology)
        devices.own_claim = lambda _: own | {"gpus": 2, "gpu": "u1", "host": "good"}
    try:
        with collectives.process_group(topology):
            return "joined"
    except ClusterError as error:
        return str(error)


@pytest.mark.fault(
    35,
    "a rank without a working GPU",
    becomes="refused on all ranks, the rank named",
)
def test_truth_08_ranks_with_and_without_a_gpu_do_not_start_a_group() -> None:
    with started_ranks(2, join, 1) as ranks:
        results = ranks.wait(timeout_s=30)
    host = os.uname().nodename
    for result in results:
        assert result.value == (
            f"rank 0 on {host} see no working GPU, and the other ranks do; expected a GPU for "
            "every rank, or none for any. Look at `nvidia-smi` there and leave the node out, or "
            "set CUDA_VISIBLE_DEVICES alike."
        ), result.output


def deepspeeds_ordinal() -> list[Any]:
    """What DeepSpeed and the stages read, on a launcher that shows rank 1 one GPU."""
    import torch

    topology = from_environment()
    devices.own_claim = lambda t: claim("a", t.local_rank, 1, f"u{t.local_rank}")
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    torch.cuda.set_device = lambda device: None
    import deepspeed

    deepspeed.init_distributed = lambda **_: None  # NCCL is not here
    collectives._unlink_shared_memory = lambda _: None  # pyright: ignore[reportPrivateUsage]
    with collectives.process_group(topology) as device:
        return [str(device), os.environ["LOCAL_RANK"], topology.local_rank]


@pytest.mark.fault(35, "a launcher that shows each rank one GPU", becomes="each rank takes its own")
def test_truth_08_one_visible_gpu_a_rank_is_ordinal_0_for_deepspeed() -> None:
    with started_ranks(2, deepspeeds_ordinal) as ranks:
        results = ranks.wait(timeout_s=30)
    assert [r.value for r in results] == [["cuda:0", "0", 0], ["cuda:0", "0", 1]], results
