"""Which kernel attends over the packed row, and why."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, cast

import torch
from torch import nn

from dpo_dist.engine.forward.attention import Backend
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.errors import ConfigError

_LARGEST_HEAD = 256  # elements of a head that the variable-length kernels take
_PREFERENCE: tuple[Backend, ...] = ("flash_attn", "torch", "sdpa")


def choose_backend(
    model: nn.Module,
    requested: Literal["auto", "flash_attn", "torch", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Backend, str]:
    """(backend, reason): the first of flash_attn, torch, sdpa that can run this model here.

    A backend that does not honor something the model asks for (soft cap, sinks, dropout, head
    size) is passed over. Raises ConfigError when such a one is requested by name.
    """
    obstacles = {
        backend: device_obstacle(backend, device, dtype) or model_obstacle(backend, model)
        for backend in _PREFERENCE
    }
    usable: list[Backend] = [backend for backend in _PREFERENCE if obstacles[backend] is None]
    if requested == "auto":
        passed_over = [obstacle for obstacle in obstacles.values() if obstacle is not None]
        reason = "; ".join(dict.fromkeys(passed_over)) or "flash-attn is installed"
        return usable[0], reason
    if requested not in usable:
        raise ConfigError(
            f"model.attention is {requested}, but {obstacles[requested]}",
            f"a backend that can run this model here: auto, {', '.join(usable)}",
            "Set model.attention to one of them.",
        )
    return cast(Backend, requested), "requested"


def device_obstacle(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on this device at all, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"variable-length kernels need a CUDA device, and this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"variable-length kernels need compute capability 8.0, and this device has {found}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"variable-length kernels need half precision, and the model is {dtype}"
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None


def model_obstacle(backend: Backend, model: nn.Module) -> str | None:
    """What this model asks for that `backend` does not honor, or None."""
    if backend == "sdpa":
        return None
    base = base_of(model)
    config = base.config.get_text_config()
    softcap = getattr(config, "attn_logit_softcapping", None)
    dropout = _attention_dropout(base)
    head_size = _head_size(config)
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in base.named_parameters()):
        return "variable-length kernels have no attention sinks, and the model does"
    if head_size > _LARGEST_HEAD or head_size % 8:
        return f"variable-length kernels take heads of 8, 16, ... {_LARGEST_HEAD}, not {head_size}"
    if backend == "torch" and softcap is not None:
        return f"torch's kernel has no soft cap, and the model caps its scores at {softcap}"
    if backend == "torch" and dropout > 0:
        return f"torch's kernel has no dropout, and the model drops {dropout} of its attention"
    if softcap is not None and dropout > 0:
        return f"flash-attn takes no soft cap ({softcap}) together with dropout ({dropout})"
    return None


def _attention_dropout(model: nn.Module) -> float:
    """Largest dropout on attention weights, as a number or a module: the config may be outdated."""
    found = [0.0]
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            dropout = getattr(module, name, 0.0)
            found.append(float(dropout.p if isinstance(dropout, nn.Dropout) else dropout))
    return max(found)


def _head_size(config: Any) -> int:
    """Elements of a query head; multi-latent attention has larger ones than of the values."""
    named = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    return named or config.hidden_size // config.num_attention_heads
