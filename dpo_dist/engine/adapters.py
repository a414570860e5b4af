"""LoRA as a difference of the model: nothing after this file asks whether there is one."""

from torch import nn

from dpo_dist.errors import ConfigError
from dpo_dist.sections.training import AdapterSection

ADAPTER_NAME = "default"  # peft's own name, part of the parameter names in checkpoints


def add_adapter(model: nn.Module, adapter: AdapterSection, base_model_path: str) -> nn.Module:
    """Freezes the model and adds a trainable adapter in the model's own dtype.

    Raises ConfigError when a name in `target_modules` or `modules_to_save` matches nothing, and
    when peft cannot adapt a module that is named.
    """
    import peft

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(adapter, key)
        missing = (
            [] if isinstance(wanted, str) else [n for n in wanted if n.split(".")[-1] not in names]
        )
        if missing:
            linear = sorted(
                {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            )
            raise ConfigError(
                f"adapter.{key}: the model has no module {', '.join(missing)}",
                f"names of its modules, such as {', '.join(linear)}",
                f"Correct adapter.{key}.",
            )
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_path,
    )
    # ZeRO-3 gathers a layer's parameters together, which needs one dtype.
    try:
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore
    except ValueError as error:
        raise ConfigError(
            f"peft cannot adapt this model ({' '.join(str(error).split())})",
            "modules and options that it takes",
            "Name other adapter.target_modules, or leave out adapter.use_dora and adapter.dropout.",
        ) from error


def write_adapter_config(policy: nn.Module, folder: str) -> None:
    """Writes peft's adapter_config.json of a policy with an adapter."""
    policy.peft_config[ADAPTER_NAME].save_pretrained(folder)  # pyright: ignore
