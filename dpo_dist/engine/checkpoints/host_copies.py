"""Copies of this rank's shards in host memory, from which a checkpoint is written behind.

torch's stager makes them: it keeps the memory of a tensor that lives on, such as an optimizer's
state, from one checkpoint to the next (pinned where there is a GPU), so that only the first copy
pays for new pages.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# A private module: tests/test_private_interfaces.py has what is asked of it.
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from dpo_dist.engine.distributed.memory import free_host_bytes
from dpo_dist.planning.sizes import GIB

SPARE_SHARE = 0.2  # of a host's free memory, for what else runs there
_logger = logging.getLogger(__name__)


class HostCopies:
    """Room for one copy of what this rank saves, on a host with `ranks_of_host` of them."""

    def __init__(self, ranks_of_host: int) -> None:
        self._ranks_of_host = ranks_of_host
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        self._with_room: dict[str, bool] = {}  # by kind of shard, decided by the first one

    def have_room(self, shard: str, num_bytes: int) -> bool:
        """Whether a shard of so many bytes fits into free memory; found out once and told."""
        if shard not in self._with_room:
            free = free_host_bytes() * (1 - SPARE_SHARE)
            self._with_room[shard] = self._ranks_of_host * num_bytes <= free
            if not self._with_room[shard]:
                _logger.warning(
                    "checkpoints are written before training goes on: %d ranks of this host x "
                    "%.2f GiB of %s to copy, %.2f GiB of memory free",
                    self._ranks_of_host, num_bytes / GIB, shard, free / GIB,
                )  # fmt: skip
        return self._with_room[shard]

    def copy(self, state_dict: Mapping[str, Any]) -> Any:
        """A copy with all tensors in host memory; it is overwritten by the next one."""
        copied = self._stager.stage(state_dict, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied


def num_tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a state dict, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors_in(value)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
