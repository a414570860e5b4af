"""Which kernel attends over the packed row, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from dpo_dist.engine.attention import Backend
from dpo_dist.engine.model_parts import base_of
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

    A backend that does not honour something the model asks for (soft cap, sinks, dropout, head
    size) is passed over. Raises ConfigError when such a one is requested by name.
    """
    blockers = {name: _BLOCKERS[name](model, device, dtype) for name in _PREFERENCE}
    if requested != "auto":
        blocker = blockers[requested]
        if blocker is not None:
            usable = [name for name in _PREFERENCE if blockers[name] is None]
            raise ConfigError(
                f"model.attention is {requested}, but {blocker}",
                f"a backend that can run this model here: auto, {', '.join(usable)}",
                "Set model.attention to one of them.",
            )
        return requested, "requested"
    chosen = next(name for name in _PREFERENCE if blockers[name] is None)
    passed_over = [blocker for blocker in blockers.values() if blocker is not None]
    return chosen, "; ".join(dict.fromkeys(passed_over)) or "flash-attn is installed"


def _flash_attn_blocker(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    blocker = _varlen_blocker(model, device, dtype)
    if blocker is not None:
        return blocker
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    config = base_of(model).config.get_text_config()
    if _softcap(config) is not None and _dropout(config) > 0:
        return "flash-attn takes no soft cap together with attention dropout"
    return None


def _torch_blocker(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    blocker = _varlen_blocker(model, device, dtype)
    if blocker is not None:
        return blocker
    config = base_of(model).config.get_text_config()
    if _softcap(config) is not None:
        return f"torch's kernel has no soft cap, and the model's scores are capped at {_softcap(config)}"
    if _dropout(config) > 0:
        return f"torch's kernel has no dropout, and the model's is {_dropout(config)}"
    return None


def _varlen_blocker(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no variable-length kernel can run this model here."""
    if device.type != "cuda":
        return f"variable-length kernels need a CUDA device, and this is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"variable-length kernels need compute capability 8.0, not {_capability(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"variable-length kernels need half precision, not {dtype}"
    base = base_of(model)
    config = base.config.get_text_config()
    head_size = _head_size(config)
    if head_size > _LARGEST_HEAD or head_size % 8:
        return (
            f"variable-length kernels need heads of a multiple of 8 up to {_LARGEST_HEAD}, "
            f"not {head_size}"
        )
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in base.named_parameters()):
        return "variable-length kernels have no attention sinks, and the model does"
    return None


def _never(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


_BLOCKERS: dict[str, Callable[[nn.Module, torch.device, torch.dtype], str | None]] = {
    "flash_attn": _flash_attn_blocker,
    "torch": _torch_blocker,
    "sdpa": _never,
}


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _softcap(config: Any) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


def _dropout(config: Any) -> float:
    """Dropout on attention weights; families spell it in two ways, and the second is GPT-2's."""
    names = ("attention_dropout", "attn_pdrop")
    return max(float(getattr(config, name, None) or 0.0) for name in names)


def _head_size(config: Any) -> int:
    multi_latent = getattr(config, "qk_head_dim", None)  # deepseek: larger than that of the values
    named = multi_latent or getattr(config, "head_dim", None)
    return named or config.hidden_size // config.num_attention_heads
