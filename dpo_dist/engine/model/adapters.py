"""LoRA as a difference of the model: nothing after this file asks whether there is one."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.weights.adapter_file import ADAPTER_NAME, read_start
from dpo_dist.errors import ConfigError


def add_adapter(
    model: nn.Module, adapter: AdapterSection, base_model_path: str, start: Path | None = None
) -> nn.Module:
    """Freezes the model and adds a trainable adapter in the model's own dtype.

    The settings are those of the adapter in `start` when training continues it, else the run's;
    `fill_adapter` then brings the weights. Raises ConfigError when a name or expression in
    `target_modules`, `modules_to_save`, `target_parameters` or a pattern fits nothing, and when
    peft cannot adapt a module that is named; ModelFilesError when `start` is of a kind that cannot
    be continued.
    """
    import peft

    if start is not None:
        config = read_start(start, adapter.dropout)
    else:
        _check_names(model, adapter)
        config = _lora_config(adapter)
    config.base_model_name_or_path = None  # peft puts the model's own name there, which may be none
    # ZeRO-3 gathers a layer's parameters together, which needs one dtype.
    try:
        policy: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore
    except ValueError as error:
        raise ConfigError(
            f"peft cannot adapt this model ({' '.join(str(error).split())})",
            "modules and options that it takes",
            "Name other adapter.target_modules, or leave out adapter.use_dora and adapter.dropout.",
        ) from error
    policy.peft_config[ADAPTER_NAME].base_model_name_or_path = base_model_path
    if start is None:
        _check_patterns(policy, adapter)
    refuse_partitions_beside_adapted(policy)
    return policy


def refuse_partitions_beside_adapted(policy: nn.Module, *, all_partitioned: bool = False) -> None:
    """Raises ConfigError where ZeRO-3 would end with a tracing error at the second forward.

    Peft takes an adapted parameter off its module during a forward, and DeepSpeed then looks in
    vain for the parameters that are left there in the order that it noted.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [module for module in policy.modules() if isinstance(module, ParamWrapper)]
    for wrapper in wrappers:
        module = wrapper.get_base_layer()
        adapted = {w.parameter_name for w in wrappers if w.get_base_layer() is module}
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        names = [name for name, _ in own if name not in adapted]
        beside = [name for name in names if name.endswith("bias")]  # other weights are no trouble
        partitioned = all_partitioned or hasattr(getattr(module, wrapper.parameter_name), "ds_id")
        if beside and partitioned:
            raise ConfigError(
                f"the adapter takes {', '.join(sorted(adapted))} of experts that have "
                f"{', '.join(beside)} beside, in the partitions of ZeRO-3",
                "whole weights there: DeepSpeed loses track of what is beside an adapted parameter",
                "Set train.deepspeed=zero2 and reference.sharding=whole, or name the layers "
                "without the experts in adapter.target_modules.",
            )


def _lora_config(adapter: AdapterSection) -> Any:
    import peft

    targets = adapter.target_modules
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=list(adapter.exclude_modules) or None,
        target_parameters=list(adapter.target_parameters) or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def _check_names(model: nn.Module, adapter: AdapterSection) -> None:
    """Raises ConfigError for a name that the model has not: peft takes it if another one fits."""
    modules = [name for name, _ in model.named_modules() if name]
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = [name for name, _ in model.named_parameters()]
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        expected = getattr(adapter, key)
        if not isinstance(expected, str):
            _refuse_unknown(key, "module", expected, modules, linear)
        elif expected != "all-linear" and not any(re.fullmatch(expected, n) for n in modules):
            shown = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise ConfigError(
                f"adapter.{key}: the regular expression {expected} fits no module's whole name",
                f"one that does, such as .*\\.({shown.replace(', ', '|')})",
                f"Correct it, or write names as a list: adapter.{key}=[{shown}].",
            )
    matrices = {name for name in parameters if not name.endswith(("weight", "bias"))}
    _refuse_unknown(
        "target_parameters", "parameter", adapter.target_parameters, parameters, matrices
    )


def _refuse_unknown(
    key: str, what: str, expected: Iterable[str], known: Iterable[str], examples: Iterable[str]
) -> None:
    missing = [n for n in expected if not any(k == n or k.endswith(f".{n}") for k in known)]
    if missing:
        shown = sorted({name.rsplit(".", 1)[-1] for name in examples})
        raise ConfigError(
            f"adapter.{key}: the model has no {what} {', '.join(missing)}",
            f"names of its {what}s" + (f", such as {', '.join(shown)}" if shown else ""),
            f"Correct adapter.{key}.",
        )


def _check_patterns(policy: Any, adapter: AdapterSection) -> None:
    """Raises ConfigError for a pattern that fits no adapted module: peft would only warn."""
    adapted = policy.base_model.targeted_module_names + policy.base_model.targeted_parameter_names
    for key in ("rank_pattern", "alpha_pattern"):
        unused = [
            pattern
            for pattern in getattr(adapter, key)
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted)
        ]
        if unused:
            shown = sorted({name.rsplit(".", 1)[-1] for name in adapted})
            raise ConfigError(
                f"adapter.{key}: {', '.join(unused)} fits no adapted module",
                f"the end of a name, such as {', '.join(shown)} or layers.0.{shown[0]}, or a "
                "regular expression for it",
                f"Correct adapter.{key}.",
            )


def write_adapter_config(policy: Any, folder: Path, base_model: str, revision: str | None) -> None:
    """Writes adapter_config.json, which names the model the adapter belongs on."""
    settings = policy.peft_config[ADAPTER_NAME]
    # peft took the name of the skeleton, which has none
    settings.base_model_name_or_path, settings.revision = base_model, revision
    settings.inference_mode = True
    for name, value in vars(settings).items():
        if isinstance(value, set):  # its order would differ from one process to the next
            setattr(settings, name, sorted(value))
    settings.save_pretrained(str(folder))
