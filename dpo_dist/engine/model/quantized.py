"""A frozen base in NF4 (QLoRA): four bits a weight of its linear layers, through bitsandbytes.

NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314): a block of 64 weights shares
a scale, 256 scales share one of their own, and every product unpacks the weight into the model's
dtype first. Embeddings, norms and the output head stay as they are.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dpo_dist.engine.sharding.optimizers import try_bitsandbytes
from dpo_dist.errors import ConfigError


def quantization_arguments(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What makes `from_pretrained` quantize the linear layers while it loads them.

    Raises ConfigError when bitsandbytes is not installed or does not work on `device`.
    """
    try_bitsandbytes("model.quantization: nf4", device)
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 shards what has the dtype of the other parameters; the bits are the same.
        bnb_4bit_quant_storage=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def settle_quantized(model: nn.Module) -> None:
    """Makes quantized layers compute the same with and without gradients.

    On CPUs with AVX512-BF16 bitsandbytes packs the weights anew at the first forward without
    gradients, for a kernel that rounds differently from the one that trains.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def refuse_trained_quantized(policy: nn.Module) -> None:
    """Raises ConfigError when packed bits would be trained as if they were numbers."""
    packed = {
        name
        for name, parameter in policy.named_parameters()
        if getattr(parameter, "quant_state", None) is not None
    }
    refuse_trained_in(policy, packed)


def refuse_trained_in(policy: nn.Module, packed: Collection[str]) -> None:
    """The same, where the parameters of these names are packed."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and name in packed:
            raise ConfigError(
                f"adapter.modules_to_save trains {name}, which model.quantization has packed",
                "modules that stay unquantized: embeddings, norms, the output head",
                "Leave it out, or name it in adapter.target_modules.",
            )


def count_quantized(model: Any) -> tuple[int, int]:
    """(elements, those of the largest layer) that loading in NF4 would pack; any device."""
    sizes = [module.weight.numel() for module in quantized_layers(model)]
    return sum(sizes), max(sizes, default=0)


def quantized_layers(model: Any) -> list[Any]:
    """The linear layers that loading in NF4 would pack; any device."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return [
        module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, left_out)
    ]


def true_numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter as the model sees it: unpacked, and of all ranks together."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
