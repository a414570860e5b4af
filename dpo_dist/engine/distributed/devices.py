"""Which device each rank uses, agreed by all before their process group starts."""

import datetime
import json
import socket
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch.distributed import (
    DistNetworkError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.rendezvous import rendezvous

from dpo_dist.errors import ClusterError
from dpo_dist.run.topology import Topology


class Claim(TypedDict):
    """What one rank says of itself."""

    host: str
    local_rank: int
    local_world_size: int
    gpus: int  # that the rank sees
    gpu: str | None  # what tells its own one from all others, None on a CPU


def ordinal_of(gpus: int, local_rank: int, local_world_size: int) -> int | None:
    """The number of a rank's GPU among the `gpus` that it sees, None when there is none for it.

    A launcher shows every rank all GPUs of the node, or each its own one only, which is then 0.
    """
    if gpus >= local_world_size:
        return local_rank
    return 0 if gpus == 1 else None


def own_claim(topology: Topology) -> Claim:
    """What this rank sees, without a context on any GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ordinal = ordinal_of(gpus, topology.local_rank, topology.local_world_size)
    gpu = None if ordinal is None else str(torch.cuda.get_device_properties(ordinal).uuid)
    return Claim(
        host=socket.gethostname(), local_rank=topology.local_rank,
        local_world_size=topology.local_world_size, gpus=gpus, gpu=gpu,
    )  # fmt: skip


def refuse_claims(claims: Sequence[Claim]) -> None:
    """Raises ClusterError, naming ranks and hosts, unless the claims, in rank order, fit together:
    a GPU of its own for every rank, or none for any."""
    without = [rank for rank, claim in enumerate(claims) if not claim["gpus"]]
    if without and len(without) < len(claims):
        raise ClusterError(
            f"{_named(without, claims)} see no working GPU, and the other ranks do",
            "a GPU for every rank, or none for any",
            "Look at `nvidia-smi` there and leave the node out, or set CUDA_VISIBLE_DEVICES alike.",
        )
    owners: dict[str, int] = {}
    for rank, claim in enumerate(claims):
        if without:
            continue
        taken = claim["gpu"] is None or owners.setdefault(claim["gpu"], rank) != rank
        if taken:
            raise ClusterError(
                f"{_named([rank], claims)} sees {claim['gpus']} GPUs, of which none is left for it "
                f"(local rank {claim['local_rank']} of {claim['local_world_size']})",
                "as many GPUs on a node as ranks",
                "Start fewer ranks a node, or correct what the launcher shows them "
                "(CUDA_VISIBLE_DEVICES).",
            )


def device_of(topology: Topology) -> torch.device:
    """The GPU of a rank, or the CPU when the machine has none for it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ordinal = ordinal_of(gpus, topology.local_rank, topology.local_world_size)
    return torch.device("cpu") if ordinal is None else torch.device("cuda", ordinal)


def agree_on_device(
    topology: Topology, timeout: datetime.timedelta
) -> tuple[torch.device, Store | None]:
    """This rank's device, once all ranks have said what they see; all ranks call together, with the
    launcher's variables set.

    Also the store they met in, to be held until their group has started: it shares rank 0's server.
    Raises ClusterError on every rank when the claims do not fit together, and on rank 0 when
    another process has its port.
    """
    claim, store = own_claim(topology), None
    claims = [claim]
    if topology.world_size > 1:
        store = _meet(topology, timeout)
        claims = _exchanged(claim, topology, PrefixStore("devices", store))
    refuse_claims(claims)
    return device_of(topology), store


def _meet(topology: Topology, timeout: datetime.timedelta) -> Store:
    try:
        meeting = rendezvous("env://", topology.rank, topology.world_size, timeout=timeout)
        return next(iter(meeting))[0]
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        taken = ClusterError(
            f"port {topology.master_port} of {topology.master_addr} is in use by another process",
            "a free port, at which the ranks meet",
            "Start the job again, or set another MASTER_PORT in your launcher.",
        )
        taken.transient = True  # whoever has it may be gone by then
        raise taken from None


def _exchanged(claim: Claim, topology: Topology, store: Store) -> list[Claim]:
    """The claims of all ranks, in rank order."""
    store.set(f"claim/{topology.rank}", json.dumps(claim))
    if topology.rank:
        claims = json.loads(store.get("claims"))
        store.set(f"read/{topology.rank}", "")
        return claims
    ranks = range(topology.world_size)
    claims = [json.loads(store.get(f"claim/{rank}")) for rank in ranks]
    store.set("claims", json.dumps(claims))
    store.wait([f"read/{rank}" for rank in ranks[1:]])  # a refusal ends this process, and the store
    return claims


def _named(ranks: Sequence[int], claims: Sequence[Claim]) -> str:
    shown = [f"rank {rank} on {claims[rank]['host']}" for rank in ranks[:8]]
    return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
