"""The MLP of every decoder layer over tiles of a row's tokens, each computed again in backward.

Shapes: T tokens of a row, D hidden, F intermediate; a tile has at most `tokens` of the T.

What lies between the matrices of an MLP is (tile, F) instead of (T, F), and it is not kept. What
ZeRO does decides on the form:

* It reduces a gradient when autograd hands it over. So a tile's gradients are added up in here, in
  float32, and autograd gets the sum of each parameter once, as from a whole MLP.
* In ZeRO-3 an MLP with its layers is gathered at once, around all tiles (a leaf module). Gathered
  by each tile, ranks whose rows have different numbers of tiles would wait for each other forever.

DeepSpeed's own TiledMLP does neither, and draws new dropout masks in backward.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo_dist.engine.forward.model_parts import backbone_of, base_of
from dpo_dist.errors import ConfigError

_logger = logging.getLogger(__name__)
NAMES = ("mlp", "feed_forward", "ffn", "mlp_block")  # how families call it in their layers
PROBE_TOKENS = 3
TOLERANCE = {torch.float32: 1e-3}  # of the largest output; other dtypes are coarser
COARSE_TOLERANCE = 5e-2

Forward = Callable[[Tensor], Tensor]
RandomStates = tuple[Tensor, Tensor | None]  # of the CPU, and of the GPU if there is one


def tile_mlps(policy: nn.Module, tokens: int | None, *, partitioned: bool = False) -> None:
    """Makes the dense MLPs run in tiles of so many tokens; None leaves the model as it is.

    Experts stay as they are: a router hands each of them few of the tokens. `partitioned` says
    that ZeRO-3 will shard the policy, whose engine must not have started yet; all ranks call
    together. Raises ConfigError when no layer has an MLP that can be cut.
    """
    if tokens is None:
        return
    mlps = dense_mlps(policy)
    if not mlps:
        raise ConfigError(
            f"train.tiled_mlp: {tokens} and {type(base_of(policy)).__name__} has no MLP to tile",
            f"layers with a dense {', '.join(NAMES[:-1])} or {NAMES[-1]}, which takes hidden "
            "states alone",
            "Remove train.tiled_mlp.",
        )
    for mlp in {type(mlp): mlp for mlp in mlps}.values():
        _check_pointwise(mlp, base_of(policy).config.get_text_config().hidden_size, policy)
    for mlp in mlps:
        mlp.forward = functools.partial(_in_tiles, mlp, mlp.forward, tokens)
        if partitioned:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(mlp, True)
    _logger.info("%d MLPs run in tiles of %s tokens", len(mlps), f"{tokens:,}")


def dense_mlps(policy: nn.Module) -> list[Any]:
    """The MLPs of the layers that have the shape of one: by name, without experts, one input."""
    return [
        module
        for name, module in backbone_of(policy).named_modules()
        if name.rsplit(".", 1)[-1] in NAMES and _is_dense(module)
    ]


def _is_dense(module: nn.Module) -> bool:
    parts = [name for name, _ in (*module.named_modules(), *module.named_parameters())]
    if any("expert" in part or "router" in part for part in parts):
        return False
    # stacked experts under another name, and weights that a block without layers has
    if any(len(getattr(p, "ds_shape", p.shape)) > 2 for p in module.parameters()):
        return False
    inputs = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty for each in inputs) == 1


def _check_pointwise(mlp: Any, hidden_size: int, policy: nn.Module) -> None:
    """Raises ConfigError unless a token alone gets what it gets in a row.

    Names promise nothing, and the self-check of the layout would not tell: an MLP that looks at
    other tokens fails there in a packed row only, and passes in the padded layout.
    """
    dtype, was_training = base_of(policy).dtype, mlp.training
    with torch.no_grad(), _gathered(mlp):
        device = next(mlp.parameters()).device
        # no random numbers: those that follow stay what they are without tiles
        waves = torch.arange(PROBE_TOKENS * hidden_size, dtype=torch.float32).sin()
        row = waves.view(1, PROBE_TOKENS, hidden_size).to(device, dtype)
        mlp.eval()
        whole = mlp.forward(row)
        alone = torch.cat([mlp.forward(token) for token in row.split(1, 1)], 1)
        mlp.train(was_training)
    apart = float((whole - alone).abs().max() / whole.abs().max().clamp(min=1e-30))
    if apart > TOLERANCE.get(dtype, COARSE_TOLERANCE):
        raise ConfigError(
            f"train.tiled_mlp: {type(mlp).__name__} gives a token alone {apart:.0%} else than in "
            "a row",
            "an MLP that looks at one token at a time",
            "Remove train.tiled_mlp.",
        )


def _gathered(module: nn.Module) -> Any:
    """Whole parameters where ZeRO-3 has partitioned them while loading."""
    parameters = list(module.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _in_tiles(mlp: nn.Module, whole: Forward, tokens: int, hidden: Tensor) -> Tensor:
    """What the MLP's `whole` forward gives for hidden (..., T, D), tile by tile."""
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    if not (torch.is_grad_enabled() and (hidden.requires_grad or parameters)):
        return _forward(whole, hidden, tokens)
    draws = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in mlp.modules())
    apply: Any = _Tiles.apply  # pyright: ignore
    return apply(hidden, whole, tokens, draws, *parameters)


def _forward(whole: Forward, hidden: Tensor, tokens: int) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    out: Tensor | None = None
    for tile in _tiles(len(rows), tokens):
        made = whole(_like(hidden, rows[tile])).flatten(0, -2)
        if len(made) == len(rows):
            return made.view(*hidden.shape[:-1], -1)
        out = made.new_empty(len(rows), made.shape[-1]) if out is None else out
        out[tile] = made
    assert out is not None
    return out.view(*hidden.shape[:-1], -1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, whole: Forward, tokens: int, draws: bool, *parameters: Tensor
    ) -> Tensor:
        # The parameters stay objects, not saved tensors: under ZeRO-3 their storage is freed after
        # the forward and gathered into a new one before the backward.
        ctx.whole, ctx.tokens, ctx.parameters = whole, tokens, parameters
        ctx.random = _random_states(hidden.device) if draws else None
        ctx.save_for_backward(hidden)
        return _forward(whole, hidden.detach(), tokens)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (hidden,), parameters = ctx.saved_tensors, ctx.parameters
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        grad_out = grad_outputs[0].reshape(len(rows), -1)
        needs_hidden = ctx.needs_input_grad[0]
        grad_rows = torch.empty_like(rows) if needs_hidden else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with _drawing_as(ctx.random, hidden.device), torch.enable_grad():
            for tile in _tiles(len(rows), ctx.tokens):
                part = _like(hidden, rows[tile]).requires_grad_(needs_hidden)
                part = part.view_as(part)  # no leaf: hooks of several gradients refuse it here
                out = ctx.whole(part)
                wanted = ([part] if needs_hidden else []) + list(parameters)
                found: list[Tensor | None] = list(
                    torch.autograd.grad(out, wanted, grad_out[tile].view_as(out), allow_unused=True)
                )
                del out
                if grad_rows is not None:
                    of_part = found.pop(0)
                    assert of_part is not None
                    grad_rows[tile] = of_part.flatten(0, -2)
                if len(rows) <= ctx.tokens:  # to the bit what the whole MLP gives
                    sums = found
                    break
                _add(sums, found)
        grads = (
            None if each is None else each.to(parameter.dtype)
            for each, parameter in zip(sums, parameters, strict=True)
        )
        grad_hidden = None if grad_rows is None else grad_rows.view_as(hidden)
        return grad_hidden, None, None, None, *grads


def _add(sums: list[Tensor | None], found: list[Tensor | None]) -> None:
    """Adds a tile's gradients to `sums`: of 64 tiles bfloat16 would lose a percent."""
    for index, gradient in enumerate(found):
        if gradient is None:
            continue
        before = sums[index]
        if before is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums[index] = gradient.to(wide, copy=True)  # it may be a view of what others read
        else:
            before.add_(gradient)


def _tiles(num_tokens: int, tokens: int) -> Iterator[slice]:
    for start in range(0, max(num_tokens, 1), tokens):
        yield slice(start, start + tokens)


def _like(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows (t, D) with as many dimensions as the hidden states have."""
    return rows.view(*[1] * (hidden.dim() - 2), *rows.shape)


def _random_states(device: torch.device) -> RandomStates:
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    )


@contextlib.contextmanager
def _drawing_as(
    states: tuple[Tensor, Tensor | None] | None, device: torch.device
) -> Iterator[None]:
    """The masks of the forward again; the generators go on afterwards as if nothing was drawn."""
    if states is None:
        yield
        return
    here, there = states
    with torch.random.fork_rng([device] if there is not None else []):
        torch.set_rng_state(here)
        if there is not None:
            torch.cuda.set_rng_state(there, device)
        yield
