"""Which kernel attends over the packed row, which one multiplies with experts, and why."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.attention import Backend, PackedRow, kernel_of, packed_attention
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.errors import ConfigError
from dpo_dist.extras import import_fault, in_one_line

_LARGEST_HEAD = 256  # elements of a head that the variable-length kernels take
BACKENDS: tuple[Backend, ...] = ("flash_attn", "torch", "sdpa")  # the preferred one first
_NAMES = {"flash_attn": "flash-attn", "torch": "torch's kernel", "sdpa": "sdpa"}
_TRIAL_PAIRS = [([1] * 9, [2] * 3, [3] * 5), ([1], [2] * 6, [3])]
_TRIAL_WINDOW = 4
_TRIAL_TOLERANCE = 0.05  # of numbers around 1; a wrong mask or scale moves them by tenths
Experts = Literal["grouped_mm", "eager"]  # transformers' names
_TRIAL_EXPERTS, _TRIAL_TOKENS = 3, 8
_ALIGNED = 64  # elements; where sizes are multiples of it, smaller ones show as much


def choose_backend(
    model: nn.Module,
    requested: Literal["auto", "flash_attn", "torch", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Backend, str]:
    """(backend, reason): the first of flash_attn, torch, sdpa that can run this model here.

    A backend that does not work on this machine, or does not honor something the model asks for
    (soft cap, sinks, dropout, head size), is passed over. Raises ConfigError when such a one is
    requested by name. All ranks of a process group call it together and get the same backend.
    """
    own = [
        device_obstacle(backend, device, dtype) or model_obstacle(backend, model)
        for backend in BACKENDS
    ]
    # what one rank cannot run, none does
    of_ranks = zip(*collectives.gather(own), strict=True)
    agreed = [next((one for one in said if one), None) for said in of_ranks]
    obstacles = dict(zip(BACKENDS, agreed, strict=True))
    usable: list[Backend] = [backend for backend in BACKENDS if obstacles[backend] is None]
    if requested == "auto":
        passed_over = [obstacle for obstacle in obstacles.values() if obstacle is not None]
        reason = "; ".join(dict.fromkeys(passed_over)) or "flash-attn works here"
        return usable[0], reason
    if requested not in usable:
        raise ConfigError(
            f"model.attention is {requested}, but {obstacles[requested]}",
            f"a backend that can run this model here: auto, {', '.join(usable)}",
            "Set model.attention to one of them.",
        )
    return cast(Backend, requested), "requested"


def device_obstacle(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on this device at all, or None; tried, not looked up."""
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
    return import_obstacle(backend) or kernel_obstacle(backend, device, dtype)


def import_obstacle(backend: Backend) -> str | None:
    """Why the kernel of `backend` cannot be imported, or None."""
    try:
        if backend != "sdpa":
            kernel_of(backend)
    except Exception as error:
        return f"{_NAMES[backend]} {import_fault(backend, 'flash-attn', error)[0]}"
    return None


def kernel_obstacle(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong when the kernel attends over a small row with all we ask of it, or None.

    A kernel may lack an argument in this version, or be built for other GPUs than this one.
    """
    try:
        found = _trial(backend, device, dtype)
        exact = _trial("sdpa", device, dtype)
        away = max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))
    except Exception as error:
        return f"{_NAMES[backend]} does not run on this device: {in_one_line(error)}"
    if not away <= _TRIAL_TOLERANCE:
        return f"{_NAMES[backend]} gives numbers that are {away:.1e} away from sdpa's"
    return None


@torch.enable_grad()
def _trial(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients over two pairs, windowed, with grouped heads; sdpa's in float32."""
    row = PackedRow.of(pack_pairs(_TRIAL_PAIRS, device), backend)
    chance = torch.Generator().manual_seed(0)  # the run's own generators stay as they are
    shapes = [(1, heads, int(row.query_ends[-1]), 64) for heads in (4, 2, 2)]
    drawn = [torch.randn(shape, generator=chance).to(device, dtype) for shape in shapes]
    q, k, v = ((t.float() if backend == "sdpa" else t).requires_grad_() for t in drawn)
    out, _ = packed_attention(nn.Module(), q, k, v, torch.tensor(_TRIAL_WINDOW), packed_row=row)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out) / 8)
    return [tensor.detach().float() for tensor in (out, *grads)]


def choose_experts(model: nn.Module, device: torch.device) -> tuple[Experts, str] | None:
    """(implementation, reason), and sets it; None for a model without experts to choose for.

    transformers takes `grouped_mm`, one call for all experts of a layer, wherever a family has it,
    and does not try it. Where it fails or gives other numbers, the loop over experts is taken. All
    ranks of a process group call it together and get the same one.
    """
    base = base_of(model)
    layers = {
        tuple(tuple(shape) for shape in _shapes(module).values()): module
        for module in base.modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }
    own = next(filter(None, (experts_obstacle(base, one, device) for one in layers.values())), None)
    obstacle = next((one for one in collectives.gather(own) if one), None)
    if not layers:
        return None
    chosen: Experts = "eager" if obstacle else "grouped_mm"
    base.set_experts_implementation(chosen)
    return chosen, obstacle or "it works here"


def experts_obstacle(base: Any, experts: nn.Module, device: torch.device) -> str | None:
    """What is wrong when `grouped_mm` runs a few experts of this family and alignment, or None."""
    dtype = next(experts.parameters()).dtype
    try:
        found = _trial_of_experts(base, experts, "grouped_mm", device, dtype)
        exact = _trial_of_experts(base, experts, "eager", device, torch.float32)
        away = max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))
    except Exception as error:
        return f"grouped_mm does not run here: {in_one_line(error)}"
    if not away <= _TRIAL_TOLERANCE:
        return f"grouped_mm gives numbers that are {away:.1e} away from a loop over experts"
    return None


class _FewExperts:
    """The experts of a layer with other weights: stands in as `self` of their forward."""

    def __init__(self, experts: nn.Module, weights: dict[str, Tensor]) -> None:
        self._experts = experts
        vars(self).update(weights, num_experts=_TRIAL_EXPERTS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


@torch.enable_grad()
def _trial_of_experts(
    base: Any, experts: nn.Module, kind: Experts, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of a few experts, one of which gets no token, in float32."""
    chance = torch.Generator().manual_seed(0)
    shapes = {name: (_TRIAL_EXPERTS, *shape[1:]) for name, shape in _small_shapes(experts).items()}
    weights = {
        name: (torch.randn(shape, generator=chance) / shape[-1] ** 0.5).to(dtype)
        for name, shape in shapes.items()
    }
    transposed = bool(experts.is_transposed)
    hidden_size = shapes["down_proj"][-1 if transposed else -2]
    hidden = torch.randn(_TRIAL_TOKENS, hidden_size, generator=chance).to(dtype)
    given = [t.to(device).requires_grad_() for t in (hidden, *weights.values())]
    few = _FewExperts(experts, dict(zip(weights, given[1:], strict=True)))
    chosen = torch.tensor([[0, 1], [1, 0]] * (_TRIAL_TOKENS // 2), device=device)
    shares = torch.tensor([[0.75, 0.25]], device=device, dtype=dtype).expand(_TRIAL_TOKENS, -1)
    base.set_experts_implementation(kind)
    out = type(experts).forward(cast(Any, few), given[0], chosen, shares)
    grads = torch.autograd.grad(out, given, torch.ones_like(out) / 8)
    return [tensor.detach().float() for tensor in (out, *grads)]


def _shapes(experts: nn.Module) -> dict[str, torch.Size]:
    """Of the parameters of a layer's experts, also while ZeRO-3 holds them in partitions."""
    return {
        name: getattr(parameter, "ds_shape", parameter.shape)
        for name, parameter in experts.named_parameters(recurse=False)
    }


def _small_shapes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """The same for smaller experts whose rows start at addresses as even as theirs."""
    shapes = _shapes(experts)
    common = math.gcd(*shapes["down_proj"][1:])
    divisor = common // math.gcd(common, _ALIGNED)
    return {name: tuple(size // divisor for size in shape) for name, shape in shapes.items()}


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
