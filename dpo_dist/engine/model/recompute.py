"""Gradient checkpointing: a layer keeps its input alone and is computed again in backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.errors import ConfigError


def recompute_layers(policy: Any, *, offload: bool = False) -> None:
    """Switches it on; with `offload` the inputs wait for the backward in host memory.

    transformers has the same as an option of `activation_checkpointing_enable`, which fails on
    machines without a GPU. Raises ConfigError for a model whose layers cannot be reached.
    """
    # ZeRO-3 with adapters gathers a recomputed layer only under the reentrant kind, which
    # in turn needs an input with a gradient when the embeddings are frozen.
    policy.activation_checkpointing_enable({"use_reentrant": True})
    policy.enable_input_require_grads()
    if not offload:
        return
    layers = [m for m in policy.modules() if "_gradient_checkpointing_func" in vars(m)]
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(_offloading, checkpoint)
    if not layers:
        raise ConfigError(
            f"train.offload_activations: true and {type(base_of(policy)).__name__} recomputes its "
            "layers in a way of its own",
            "a model whose layers are recomputed by transformers",
            "Set it to false.",
        )


def _offloading(checkpoint: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Only inputs of the layer are saved in here: its own forward runs without gradients."""
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, **kwargs)


def _to_host(tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    if not tensor.is_floating_point():  # positions and their kin, which all layers share
        return tensor
    # Pinned, so that the host need not wait. Both copies run on the stream that computes: the one
    # back cannot overtake this one, and the device may reuse the memory after it.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True), tensor.device


def _from_host(saved: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    host, device = saved
    return host.to(device, non_blocking=True)
