"""A second device on the CPU build of torch: no numbers, but what crosses between the two.

    with second_device() as device:                     # on a rank of support.ranks
        scorer = PairScorer(on_device(tiny_model("llama", dtype=torch.bfloat16)))
        with Traffic() as traffic:
            score_pairs(scorer, pack_pairs(pairs(), device)).sum().backward()
        assert (traffic.uploads, traffic.blocking, traffic.waits) == (6, [], [])

Shapes, dtypes, devices and gradients are those that a GPU would give. An operation that mixes the
devices raises, and so does one whose shape depends on numbers that the device has yet to compute,
such as `nonzero`. What brings numbers back to the host is counted, with its place in the code.

torch's registration is for the whole process and cannot be undone, so the process of pytest never
enters: `Traffic` and its kin are for ranks of their own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "gpu"
_SCALAR = torch.ops.aten._local_scalar_dense.default
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Backend:
    """What torch's autocast and its checkpointing ask of a device's module."""

    def __init__(self) -> None:
        for name in ("is_initialized", "is_available"):
            setattr(self, name, lambda: True)

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_rng_state(self) -> None: ...

    def set_rng_state(self, state: None) -> None: ...


class _Fake(FakeTensorMode):
    avoid_device_init = True  # pyright: ignore[reportAssignmentType]
    # `torch.tensor(..., device=)` then shows the copy that it makes


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """The device; inside, tensors have no numbers, and those made outside count as the CPU's.

    transformers skips what waits for the device where it sees such tensors, and must not know.
    """
    from transformers.utils import import_utils

    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Backend())
    real = mock.patch.object(import_utils, "is_fake_tensor", lambda _: False)
    arrays = mock.patch.object(torch.Tensor, "numpy", _zeros)
    with real, arrays, _Fake(allow_non_fake_inputs=True):
        yield torch.device(NAME)


def _zeros(tensor: Tensor) -> npt.NDArray[Any]:
    """The numbers of a tensor that has come back to the host."""
    assert tensor.device.type == "cpu", f"numpy cannot read a tensor on {tensor.device.type}"
    return np.zeros(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))


def on_device(model: Any) -> Any:
    """The model with its parameters and buffers on the device, tied where they were."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return moved.setdefault(id(tensor), empty)

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: move(t) for name, t in tensors.items() if t is not None}
    return model


class Traffic(TorchDispatchMode):
    """What crosses while it is entered; places are "file:function", the
    innermost outside of torch.

    An upload that is blocking lets the host wait until the device has done all that it was told
    before; what is read of the device by `waits` does as well, and is answered with zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.blocking: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SCALAR:
            return self._scalar(*args)
        result = func(*args, **kwargs)
        if func in _COPIES:
            source = args[-1] if func is _COPIES[0] else args[1]
            self._copied(source.device.type, result.device.type, kwargs)
        return result

    def _copied(self, source: str, target: str, kwargs: dict[str, Any]) -> None:
        if (source, target) == ("cpu", NAME):
            self.uploads += 1
            if not kwargs.get("non_blocking"):
                self.blocking.append(_place())
        elif (source, target) == (NAME, "cpu"):
            self.waits.append(_place())

    def _scalar(self, tensor: Tensor) -> Any:
        if tensor.device.type == NAME:
            self.waits.append(_place())
        try:
            return _SCALAR(tensor)
        except DataDependentOutputException:
            return {torch.bool: False}.get(tensor.dtype, 0.0 if tensor.is_floating_point() else 0)


def _place() -> str:
    """Where the code stands that asked for this: the innermost frame outside of torch."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != Path(__file__):
            break
        frame = frame.f_back
    assert frame is not None
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
