"""Streaming reader of sharded checkpoints: one parameter in memory at a time.

    with open_checkpoint(step_dir) as shards:
        for name in shards.names_and_shapes:
            weight = shards.read(name)  # float32
            rest = shards.read_part(name, start, numel, "exp_avg")  # opened with moments=True

How a parameter of n elements lies in the files of W ranks:

    stage 0     whole in the module weights of rank 0
    stage 1, 2  the parameters of a group lie one after the other, each followed by its alignment
                padding, in one vector that is cut into W parts; the padding at its end is left out
    stage 3     cut into W pieces of ceil(n / W), the last padded; a rank keeps its pieces of the
                parameters of a sub-group one after the other

The pickles are read with fake tensors that know where in the file their data is, and with the
restricted unpickler; the data is then read with plain file reads, so it never stays mapped.
"""

import contextlib
import math
import mmap
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_dist.engine.checkpoints.commit import find_changed, read_committed
from dpo_dist.engine.checkpoints.train_state import read_train_state
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import TRAIN_STATE_NAME
from dpo_dist.watch.heartbeat import beat
from dpo_dist.wording import first_line

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")  # what AdamW keeps, named as by DeepSpeed
ShapeGroups = Sequence[Mapping[str, torch.Size]]  # of parameters, by name, a group each
FlatGroups = Sequence[Sequence["FlatTensor"]]  # [rank][group]

# What lies beside the tensors and is not needed here, so that DeepSpeed is not imported for it.
# Some releases of Python pickle a member of an enumeration as getattr(class, name).
IGNORED_CLASSES = (
    "builtins.getattr",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@dataclass(frozen=True)
class FlatTensor:
    """A contiguous tensor as it lies in a file: its first byte, number of elements and type."""

    stream: BinaryIO
    offset: int
    numel: int
    dtype: torch.dtype

    def part(self, start: int, numel: int) -> "FlatTensor":
        """The elements [start, start + numel)."""
        assert 0 <= start <= start + numel <= self.numel, f"{start}+{numel} of {self.numel}"
        offset = self.offset + start * self.dtype.itemsize
        return FlatTensor(self.stream, offset, numel, self.dtype)

    def read_into(self, target: torch.Tensor) -> None:
        """Fills a float32 vector of `numel` elements."""
        own = (
            target if self.dtype == target.dtype else target.new_empty(self.numel, dtype=self.dtype)
        )
        buffer = memoryview(own.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        self.stream.seek(self.offset)
        if self.stream.readinto(buffer) != len(buffer):  # pyright: ignore[reportAttributeAccessIssue]
            raise _unexpected(self.stream.name, "is cut short")
        if own is not target:
            target.copy_(own)
        beat()


@dataclass(frozen=True)
class ShardedCheckpoint:
    """The trainable parameters of a checkpoint, named as in the trained module.

    Frozen parameters are in no checkpoint: they are the base model's.
    """

    names_and_shapes: Mapping[str, torch.Size]
    aliases: Mapping[str, str]  # second name of a tied parameter -> the name that is read
    extents: Mapping[str, Mapping[str, Sequence[FlatTensor]]]  # by state, then by parameter

    def read(self, name: str) -> torch.Tensor:
        """The fp32 master weight of a parameter (stage 0: the weight itself) as float32."""
        shape = self.names_and_shapes[self.aliases.get(name, name)]
        return self.read_part(name, 0, shape.numel()).view(shape)

    def read_part(self, name: str, start: int, numel: int, state: str = MASTER) -> torch.Tensor:
        """The elements [start, start + numel) of a parameter's state, (numel,) in float32."""
        part, done = _empty(numel), 0
        for extent in _across(self.extents[state][self.aliases.get(name, name)], start, numel):
            extent.read_into(part[done : done + extent.numel])
            done += extent.numel
        return part


def _empty(numel: int) -> torch.Tensor:
    """A float32 vector whose memory goes back to the system with it.

    The C library keeps aligned blocks that were freed and often cannot use them again, so a
    reader of many parameters would grow.
    """
    if not numel:
        return torch.empty(0)
    block = mmap.mmap(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(block, dtype=torch.float32)


@contextlib.contextmanager
def open_checkpoint(
    step_dir: Path, *, verified: bool = False, moments: bool = False
) -> Iterator[ShardedCheckpoint]:
    """Opens a checkpoint of any ZeRO stage and number of ranks for reading.

    With `verified` the contents were compared with the manifest already, so that only names and
    sizes are. With `moments`, from stage 1 on, those of AdamW can be read as well. All files are
    open from here on, so pruning does not disturb the reader. Raises CheckpointError when the
    checkpoint is damaged or not of a known layout.
    """
    files = read_committed(step_dir)
    state = read_train_state(step_dir)
    with contextlib.ExitStack() as stack:
        streams = {
            name: stack.enter_context((step_dir / name).open("rb"))
            for name in files
            if name.endswith("_states.pt")
        }
        changed = [] if verified else find_changed(step_dir, files, streams)
        if changed:
            raise CheckpointError(changed[0], "the committed content", "Export another checkpoint.")
        wanted = (MASTER, *MOMENTS) if moments else (MASTER,)
        try:
            shards = _describe(streams, state.zero_stage, state.world_size, wanted)
        except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
            raise _unexpected(step_dir, f"holds another layout ({error!r})") from error
        yield shards


def model_states_name(stage: int) -> str:
    """The file with all that is not of the optimizer; of stage 3, rank 0's."""
    return f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"


def optim_states_name(names: Container[str], rank: int) -> str:
    """The file with a rank's part of the optimizer."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return name if name in names else f"bf16_{name}"


def base_state(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of torch's optimizer within that of ZeRO's."""
    return optimizer.get("optimizer_state_dict") or optimizer["base_optimizer_state"]


def _describe(
    streams: Mapping[str, BinaryIO], stage: int, world_size: int, wanted: Sequence[str]
) -> ShardedCheckpoint:
    model_stream, model = _unpickle(streams, model_states_name(stage))
    if stage == 0:
        return _whole_tensors(model_stream, model)
    masters = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat_groups: dict[str, list[list[FlatTensor]]] = {state: [] for state in wanted}
    paddings: Sequence[Sequence[int]] = []
    for rank in range(world_size):
        stream, shard = _unpickle(streams, optim_states_name(streams, rank))
        optimizer = shard["optimizer_state_dict"]
        for state, groups in flat_groups.items():
            moments = sorted(base_state(optimizer)["state"].items())
            flats = optimizer[masters] if state == MASTER else [m[state] for _, m in moments]
            groups.append([_locate(stream, flat) for flat in flats])
        paddings = optimizer.get("param_alignment_paddings", [])
    shapes: ShapeGroups = model["param_shapes"]
    extents = {
        state: _stage3_extents(shapes, groups)
        if stage == 3
        else _stage12_extents(shapes, groups, paddings)
        for state, groups in flat_groups.items()
    }
    names_and_shapes = {name: torch.Size(s) for group in shapes for name, s in group.items()}
    shared: Mapping[str, str] = model["shared_params"]
    aliases = {alias: name for alias, name in shared.items() if name in names_and_shapes}
    return ShardedCheckpoint(names_and_shapes, aliases, extents)


def _unpickle(streams: Mapping[str, BinaryIO], name: str) -> tuple[BinaryIO, dict[str, Any]]:
    """A shard's stream and its content with fake tensors; nothing in it can run code."""
    if name not in streams:
        raise _unexpected(name, "is not in the checkpoint")
    ignored: list[Any] = [(_Ignored, name) for name in IGNORED_CLASSES]
    try:
        with torch.serialization.safe_globals(ignored), FakeTensorMode():
            content = torch.load(streams[name], map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle makes of the unpickler is any of a dozen
        raise _unexpected(streams[name].name, f"is not readable ({first_line(error)})") from None
    return streams[name], content


class _Ignored:
    """Stands for an object of the pickle that nobody looks at."""

    def __new__(cls, *args: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _locate(stream: BinaryIO, tensor: torch.Tensor) -> FlatTensor:
    """Where in the file a fake tensor's data lies."""
    if not tensor.is_contiguous():
        raise _unexpected(stream.name, "holds a tensor that is not contiguous")
    first_byte = tensor.untyped_storage()._checkpoint_offset
    assert first_byte is not None, f"torch did not tell where {stream.name} keeps its data"
    offset = first_byte + int(tensor.storage_offset()) * tensor.element_size()
    return FlatTensor(stream, offset, tensor.numel(), tensor.dtype)


def _whole_tensors(stream: BinaryIO, model: Mapping[str, Any]) -> ShardedCheckpoint:
    """Stage 0; tied parameters are the names whose data lies at the same place."""
    shapes: dict[str, torch.Size] = {}
    extents: dict[str, Sequence[FlatTensor]] = {}
    aliases: dict[str, str] = {}
    name_at: dict[int, str] = {}
    for name, tensor in model["module"].items():
        if name in model["buffer_names"]:
            continue
        flat = _locate(stream, tensor)
        first = name_at.setdefault(flat.offset, name) if flat.numel else name
        if first != name:
            aliases[name] = first
        else:
            shapes[name], extents[name] = tensor.shape, [flat]
    return ShardedCheckpoint(shapes, aliases, {MASTER: extents})


def _stage12_extents(
    shapes: ShapeGroups, flat_groups: FlatGroups, paddings: Sequence[Sequence[int]]
) -> dict[str, list[FlatTensor]]:
    extents = {}
    for index, group in enumerate(shapes):
        parts = [rank_groups[index] for rank_groups in flat_groups]
        start = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            extents[name] = _across(parts, start, math.prod(shape))
            start += math.prod(shape) + padding
    return extents


def _across(parts: Sequence[FlatTensor], start: int, numel: int) -> list[FlatTensor]:
    """The elements [start, start + numel) of a vector that lies in parts one after the other."""
    found, first = [], 0
    for part in parts:
        low = max(start, first)
        high = min(start + numel, first + part.numel)
        if low < high:
            found.append(part.part(low - first, high - low))
        first += part.numel
    if sum(extent.numel for extent in found) != numel:
        raise _unexpected(parts[0].stream.name, f"and its like end before element {start + numel}")
    return found


def _stage3_extents(shapes: ShapeGroups, flat_groups: FlatGroups) -> dict[str, list[FlatTensor]]:
    world_size = len(flat_groups)
    extents = {}
    for index, group in enumerate(shapes):
        flats = [rank_groups[index] for rank_groups in flat_groups]
        start = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            piece = math.ceil(numel / world_size)
            extents[name] = [
                flat.part(start, min(piece, numel - rank * piece))
                for rank, flat in enumerate(flats)
                if numel > rank * piece
            ]
            start += piece
        for flat in flats:
            if flat.numel != start:
                raise _unexpected(flat.stream.name, f"has {flat.numel} elements, not {start}")
    return extents


def _unexpected(path: Any, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {found}",
        "shards as this version of DeepSpeed writes them",
        f"Use the version that wrote the checkpoint; its {TRAIN_STATE_NAME} names it.",
    )
