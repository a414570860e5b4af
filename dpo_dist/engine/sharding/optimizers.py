"""The optimizers of `train.optimizer`; engine/ds_config.py says under which sharding each is right.

Adafactor: Shazeer and Stern 2018, arXiv:1804.04235. 8-bit states: Dettmers et al. 2021,
arXiv:2110.02861. Muon: Jordan et al. 2024, as DeepSpeed has it.
"""

from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import TrainSection
from dpo_dist.errors import ConfigError
from dpo_dist.extras import in_one_line, require_bitsandbytes

MUON_MOMENTUM = 0.95


def make_optimizer(
    module: nn.Module, ds_config: dict[str, Any], train: TrainSection
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over what trains in `module`, with the run's settings.

    AdamW is DeepSpeed's own for the CPU when its state is offloaded. Raises ConfigError when a
    library or a GPU that it needs is missing.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    shared: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    adam = {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_eps}
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # steps of the schedule's size, as with AdamW, whatever the size of a weight
        return Adafactor(parameters, **shared, scale_parameter=False, relative_step=False)
    if train.optimizer == "muon":
        return _muon(module, shared, adam)
    if train.optimizer != "adamw":
        return _from_bitsandbytes(parameters, train.optimizer, shared | adam)
    offloaded = "offload_optimizer" in ds_config["zero_optimization"]
    if offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, **shared, **adam)
    return torch.optim.AdamW(parameters, **shared, **adam, fused=torch.cuda.is_available())


def _from_bitsandbytes(
    parameters: list[nn.Parameter], name: str, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    try_bitsandbytes(f"train.optimizer: {name}", parameters[0].device)
    if name.startswith("paged") and not torch.cuda.is_available():
        raise ConfigError(
            f"train.optimizer: {name} on a machine without a GPU",
            "a CUDA GPU, whose unified memory does the paging",
            f"Choose {name.removeprefix('paged_')} here.",
        )
    from bitsandbytes import optim

    module: Any = optim  # its documented names, which it does not list in an __all__
    kinds: dict[str, Any] = {
        "adamw_8bit": module.AdamW8bit,
        "paged_adamw": module.PagedAdamW32bit,
        "paged_adamw_8bit": module.PagedAdamW8bit,
    }
    return kinds[name](parameters, **settings)


def try_bitsandbytes(key: str, device: torch.device) -> None:
    """Raises ConfigError, naming the key that needs it, unless bitsandbytes works on `device`.

    It imports without the library that fits this CUDA, and fails at the first call.
    """
    require_bitsandbytes(key)
    from bitsandbytes.functional import quantize_blockwise

    try:
        quantize_blockwise(torch.zeros(256, device=device))
    except Exception as error:
        raise ConfigError(
            f"{key}, and bitsandbytes does not run on {device.type}: {in_one_line(error)}",
            "bitsandbytes with a library for this machine",
            "See `python -m bitsandbytes`, or choose another value.",
        ) from None


def split_for_muon(module: nn.Module) -> dict[bool, list[nn.Parameter]]:
    """What trains, by whether Muon orthogonalizes it: matrices of layers, no table and no head."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    models: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
    tables += filter(None, (model.get_output_embeddings() for model in models))
    left_out = {id(p) for table in tables for p in table.parameters()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned it is a vector
            groups[len(shape) == 2 and id(parameter) not in left_out].append(parameter)
    return groups


def _muon(module: nn.Module, shared: Any, adam: Any) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups, settings = split_for_muon(module), {True: {"momentum": MUON_MOMENTUM}, False: adam}
    for uses_muon, members in groups.items():
        for parameter in members:
            parameter.use_muon = uses_muon  # pyright: ignore[reportAttributeAccessIssue]
    return MuonWithAuxAdam(
        [
            {"params": members, "use_muon": uses_muon} | shared | settings[uses_muon]
            for uses_muon, members in groups.items()
            if members
        ]
    )
