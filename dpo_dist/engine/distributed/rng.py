"""The random generators of one rank, saved and put back; kernels that repeat themselves."""

import os
import random
from typing import Any, cast

import numpy as np
import torch


def rng_states() -> dict[str, Any]:
    """States of Python's, NumPy's, torch's and the GPU's generator in plain types and tensors."""
    algorithm, keys, *position = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def make_deterministic() -> None:
    """Only kernels that give the same bits every time, from now on; call it before CUDA starts.

    torch raises RuntimeError where an operation has none. Attention kernels follow: flash-attn is
    told by its caller, torch's ask the same switch in their backward.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def restore_rng(states: dict[str, Any]) -> None:
    """Puts the states of `rng_states` back; a GPU's state is skipped on a machine without."""
    random.setstate(states["python"])
    algorithm, keys, *position = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
