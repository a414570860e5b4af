"""Loading a model for scoring or training: whole on a rank, or straight into ZeRO-3 partitions."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.model.dropout import switch_off_dropout
from dpo_dist.engine.model.quantized import quantization_arguments, settle_quantized, true_numel
from dpo_dist.errors import ModelFilesError
from dpo_dist.model_files.files import weight_files
from dpo_dist.watch.heartbeat import during


def load_model(
    model_dir: Path,
    section: ModelSection,
    *,
    device: torch.device,
    zero3: dict[str, Any] | None = None,
) -> nn.Module:
    """A causal LM in `section.dtype`, its linear layers quantized if so set, in eval mode.

    Its dropout is off. With `zero3`, the DeepSpeed config of stage 3, every parameter is
    partitioned as it is loaded and stays where DeepSpeed puts it; otherwise, and when it is
    quantized, the model goes to `device` whole. Raises ModelFilesError when a weight is missing or
    has another shape: transformers would only warn and leave random numbers in its place.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    weight_files(model_dir, section.allow_pickle_weights)
    dtype, quantized = getattr(torch, section.dtype), {}
    if section.quantization is not None:
        # DeepSpeed shards a quantized model when its engine starts: it can be packed only whole.
        quantized, zero3 = quantization_arguments(dtype, device), None
    with during("load"), partitioned_loading(zero3):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=not section.allow_pickle_weights,
            output_loading_info=True,
            **quantized,
        )
    model, report = loaded
    wrong = [
        f"{kind.removesuffix('_keys')} {sorted(map(str, report[kind]))[0]} (of {len(report[kind])})"
        for kind in ("missing_keys", "mismatched_keys")
        if report[kind]
    ]
    if wrong:
        raise ModelFilesError(
            f"{model_dir} does not fill the model: {'; '.join(wrong)}",
            "a value for every weight",
            "Download the model again, or check that it is a causal LM.",
        )
    switch_off_dropout(model)
    settle_quantized(model)
    if zero3 is None and not quantized:
        model.to(device)
    return model.eval()


@contextlib.contextmanager
def partitioned_loading(zero3: dict[str, Any] | None) -> Iterator[None]:
    """Tells transformers and peft that parameters are, or are to be, in ZeRO-3 partitions.

    peft gathers a weight only inside it, such as the one whose rows DoRA measures.
    """
    if zero3 is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers looks at this object while it lives, through a weak reference
    marker = HfDeepSpeedConfig(zero3)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del marker


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameter counts, also when they are partitioned or packed."""
    sizes = [(true_numel(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
