"""Where this process stands in its job: the only reader of the launcher's environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpo_dist.errors import ConfigError

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip

POLL_S = 0.2  # between two looks at what another process does: its end, its file, its lock
NODES_VARIABLE = "DPO_DIST_NODES"  # for words only: the node to leave out


@dataclass(frozen=True)
class Topology:
    """One rank's place: global rank of world_size, local rank of the ranks on this node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables a launcher sets for this rank."""
        values = (
            self.rank, self.world_size, self.local_rank, self.local_world_size,
            self.master_addr, self.master_port,
        )  # fmt: skip
        return dict(zip(VARIABLES, map(str, values), strict=True))

    def in_teams_of(self, size: int) -> "Topology":
        """The job as its batches see it: `size` consecutive ranks are a team, which reads one.

        Raises ConfigError when ranks would be left over.
        """
        places = count_places(self.world_size, size)
        return replace(self, rank=self.rank // size, world_size=places)


SINGLE_PROCESS = Topology(0, 1, 0, 1, "127.0.0.1", 0)


def count_places(world_size: int, size: int) -> int:
    """How many batches are read at once where `size` ranks share each (train.sequence_parallel).

    Raises ConfigError when ranks would be left over.
    """
    if world_size % size:
        raise ConfigError(
            f"train.sequence_parallel: {size} on {world_size} ranks",
            "a number of ranks that it divides",
            f"Start a multiple of {size} ranks, or set train.sequence_parallel to 1.",
        )
    return world_size // size


def launched(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher started this process as one rank of a job."""
    environ = os.environ if environ is None else environ
    return "RANK" in environ and "WORLD_SIZE" in environ


def from_environment(environ: Mapping[str, str] | None = None) -> Topology:
    """Reads the launcher's variables; raises ConfigError when one is missing or contradicts."""
    environ = os.environ if environ is None else environ
    missing = [name for name in VARIABLES if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"environment variables {', '.join(missing)} are not set",
            "all of " + " ".join(VARIABLES),
            "Start the stage through dpo-dist, or set them in your launcher.",
        )
    numbers = {}
    for name in VARIABLES:
        if name == "MASTER_ADDR":
            continue
        try:
            numbers[name] = int(environ[name])
        except ValueError:
            raise ConfigError(
                f"{name}={environ[name]!r}", "an integer", "Correct it in your launcher."
            ) from None
    topology = Topology(
        numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"],
        numbers["LOCAL_WORLD_SIZE"], environ["MASTER_ADDR"], numbers["MASTER_PORT"],
    )  # fmt: skip
    if not 0 <= topology.rank < topology.world_size:
        raise ConfigError(
            f"RANK={topology.rank} with WORLD_SIZE={topology.world_size}",
            "0 <= RANK < WORLD_SIZE",
            "Check the number of tasks your launcher starts.",
        )
    if not 0 <= topology.local_rank < topology.local_world_size <= topology.world_size:
        raise ConfigError(
            f"LOCAL_RANK={topology.local_rank} with LOCAL_WORLD_SIZE={topology.local_world_size} "
            f"and WORLD_SIZE={topology.world_size}",
            "0 <= LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE",
            "Check the number of tasks per node.",
        )
    return topology


def node_names() -> list[str]:
    """The job's nodes in rank order as the launcher names them, empty when it does not."""
    return os.environ.get(NODES_VARIABLE, "").split()
