"""An adapter that training starts from: its settings, its weights, and whether it fits the model.

Both are read here and not by peft, which only warns of names that it does not find and leaves
fresh weights in their place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.engine.weights.safetensors_reader import Place, read_places, read_tensor
from dpo_dist.errors import ModelFilesError
from dpo_dist.model_files.adapter import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME

ADAPTER_NAME = "default"  # peft's own name, part of the parameter names in checkpoints
NUM_SHOWN = 3
# Settings that make the adapter more than low-rank changes of weights, or change the base model
# while it is set up; with any of them the base model's files alone are not what was trained.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    "ensure_weight_tying": (False, None),
}
_INITS_ON_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def read_start(folder: Path, dropout: float) -> Any:
    """peft's settings of the adapter in `folder`, made ready for training with `dropout`.

    Raises ModelFilesError for another kind of adapter than LoRA, and for variants of it that are
    more than low-rank changes of the base model's weights.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise _unusable(
            folder, f"is not readable by peft ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(config, peft.LoraConfig):
        raise _unusable(folder, f"is of kind {config.peft_type}")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_INITS_ON_THE_BASE):
        raise _unusable(folder, f"has init_lora_weights={init}, which changes the base model too")
    for name, plain in _PLAIN.items():
        value = getattr(config, name, plain[0])
        if value not in plain:
            raise _unusable(folder, f"has {name}={value}")
    config.inference_mode, config.lora_dropout, config.init_lora_weights = False, dropout, True
    return config


def fill_adapter(policy: nn.Module, folder: Path) -> None:
    """Gives a policy's adapter the weights in `folder`; raises ModelFilesError if they do not fit.

    Runs before DeepSpeed partitions the adapter, on every rank alike.
    """
    places = read_places([folder / ADAPTER_WEIGHTS_NAME])
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    check_fit(folder, places, {name: tuple(p.shape) for name, p in trained.items()})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(read_tensor(places[name_in_file(name)]))


def check_fit(
    folder: Path, places: Mapping[str, Place], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ModelFilesError unless the files hold exactly the trainable parameters `expected`."""
    found = {name: place.spec.shape for name, place in places.items()}
    shapes = {name_in_file(name): shape for name, shape in expected.items()}
    wrong = [
        f"{name} is {found[name]} in the adapter and {shape} in the model"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"{name} is in the adapter only" for name in found if name not in shapes]
    wrong += [f"{name} is in the model only" for name in shapes if name not in found]
    if not wrong:
        return
    more = f"; {len(wrong)} in all" if len(wrong) > NUM_SHOWN else ""
    vocabulary = any("embed" in line or "lm_head" in line for line in wrong)
    raise ModelFilesError(
        f"the adapter {folder} does not fit the model: {'; '.join(wrong[:NUM_SHOWN])}{more}",
        "an adapter of this base model",
        "Set model.path to the model that the adapter was trained on"
        + (
            "; if it was trained with a longer vocabulary, name the added tokens in "
            "model.add_tokens. If its file holds embeddings that it did not train, merge it with "
            "peft and set model.path to the result."
            if vocabulary
            else "."
        ),
    )


def name_in_file(parameter: str) -> str:
    """How peft calls a parameter in a file: without the adapter's name."""
    name = parameter.replace(f".modules_to_save.{ADAPTER_NAME}.", ".")
    name = name.replace(f".lora_magnitude_vector.{ADAPTER_NAME}.weight", ".lora_magnitude_vector")
    if name.endswith(f".{ADAPTER_NAME}"):  # a parameter, not a layer: lora_embedding_A.default
        return name.removesuffix(f".{ADAPTER_NAME}")
    return name.replace(f".{ADAPTER_NAME}.weight", ".weight")


class AdapterWeights:
    """An adapter's file as the trained weights of a merge, named as in the trained module."""

    def __init__(self, folder: Path, policy: nn.Module, prefix: str) -> None:
        self._places = read_places([folder / ADAPTER_WEIGHTS_NAME])
        shapes = {n: tuple(p.shape) for n, p in policy.named_parameters() if p.requires_grad}
        check_fit(folder, self._places, shapes)
        self._prefix = prefix
        self.names_and_shapes = {prefix + name: shape for name, shape in shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor as float32."""
        return read_tensor(self._places[name_in_file(name.removeprefix(self._prefix))]).float()


def _unusable(folder: Path, found: str) -> ModelFilesError:
    return ModelFilesError(
        f"the adapter {folder} {found} ({ADAPTER_CONFIG_NAME})",
        "LoRA, rsLoRA or DoRA that leaves the base model as its files have it",
        "Merge it with peft (merge_and_unload, save_pretrained) and set model.path to the result.",
    )
