"""Which weights of a base model a checkpoint changes, and how.

Names and shapes of the checkpoint are compared with the model, and nothing may be left over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dpo_dist.engine.forward.model_parts import text_parameters
from dpo_dist.engine.weights.adapter_file import ADAPTER_NAME
from dpo_dist.engine.weights.base_weights import StoredModel
from dpo_dist.errors import CheckpointError, ConfigError

POLICY = "policy."  # the model's name inside the module that is trained
_PEFT = "base_model.model."  # the base model's name inside peft's


class TrainedWeights(Protocol):
    """A checkpoint's trainable parameters by name; `read` gives float32."""

    @property
    def names_and_shapes(self) -> Mapping[str, Sequence[int]]: ...
    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Replaced:
    """A parameter trained in full, and its name in the checkpoint."""

    source: str


@dataclass(frozen=True)
class Adapted:
    """A parameter with a low-rank adapter: names in the checkpoint and how it applies."""

    lora_a: str
    lora_b: str
    magnitude: str | None
    scaling: float
    transposed: bool
    stacked: bool


Changes = Mapping[str, Replaced | Adapted]  # by name in the module


def full_changes(base: StoredModel, trained: TrainedWeights) -> Changes:
    """After full training: every parameter that a text passes through comes from the checkpoint.

    Tied parameters are in it under one of their names. Raises CheckpointError when a parameter
    is missing, has another shape, or is none of this model.
    """
    changes: dict[str, Replaced | Adapted] = {}
    expected: dict[str, tuple[int, ...]] = {}
    text = text_parameters(base.skeleton)
    for name, parameter in base.skeleton.named_parameters(remove_duplicate=False):
        if text.isdisjoint((name, *base.tied_to(name))):
            continue
        names = [POLICY + n for n in (name, *base.tied_to(name))]
        source = next((n for n in names if n in trained.names_and_shapes), names[0])
        changes[name] = Replaced(source)
        expected[source] = tuple(parameter.shape)
    _check_names(trained, expected)
    return changes


def adapter_changes(base: StoredModel, policy: Any, trained: TrainedWeights) -> Changes:
    """After LoRA: which weights of the base have an adapter, and which were trained in full.

    `policy` is peft's model on the meta device, made from the settings of the run. Raises
    CheckpointError when its parameters are not those of the checkpoint, ConfigError when an
    adapter sits on a kind of layer that this cannot merge.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    check_adapter(policy, trained)
    known = base.skeleton.state_dict()
    changes: dict[str, Replaced | Adapted] = {}
    for path, module in policy.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.scaling:
            parameter = _adapted_parameter(path, module)
            changes[parameter] = _adapted(path, module)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER_NAME]
            for name, _ in saved.named_parameters():
                source = f"{POLICY}{path}.modules_to_save.{ADAPTER_NAME}.{name}"
                changes[f"{path.removeprefix(_PEFT)}.{name}"] = Replaced(source)
    unknown = sorted(set(changes) - set(known))
    assert not unknown, f"the base model has no {unknown}"
    return changes


def check_adapter(policy: Any, trained: TrainedWeights) -> None:
    """Raises CheckpointError unless the checkpoint holds exactly the adapter of these settings."""
    expected = {
        POLICY + name: tuple(parameter.shape)
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }
    _check_names(trained, expected)


def _check_names(trained: TrainedWeights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first difference and how many there are."""
    found = {name: tuple(shape) for name, shape in trained.names_and_shapes.items()}
    wrong = [f"no {name}" for name in expected if name not in found]
    wrong += [f"{name}, which the model has not" for name in found if name not in expected]
    wrong += [
        f"{name} of shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise CheckpointError(
            f"the checkpoint holds {wrong[0]} ({len(wrong)} such of {len(expected)} parameters)",
            "the parameters that model.path and the adapter section describe",
            "Export with the settings the run was trained with.",
        )


def _adapted_parameter(path: str, module: Any) -> str:
    """Name in the base model of the weight that a peft layer adapts.

    Wrappers of single parameters lie in one another (`experts`, `experts.base_layer`).
    """
    own = ".".join(part for part in path.removeprefix(_PEFT).split(".") if part != "base_layer")
    return f"{own}.{getattr(module, 'parameter_name', 'weight')}"


def _adapted(path: str, module: Any) -> Adapted:
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.lora.layer import ParamWrapper

    kind = "lora_embedding_{}.{}" if isinstance(module, Embedding) else "lora_{}.{}.weight"
    lora_a, lora_b = (f"{POLICY}{path}.{kind.format(side, ADAPTER_NAME)}" for side in "AB")
    magnitude = None
    if module.use_dora.get(ADAPTER_NAME):
        magnitude = f"{POLICY}{path}.lora_magnitude_vector.{ADAPTER_NAME}.weight"
    stacked = False
    if isinstance(module, ParamWrapper):
        stacked = module.get_param().dim() == 3
        transposed = stacked and getattr(module.get_base_layer(), "is_transposed", False)
    elif isinstance(module, Embedding):
        transposed = True
    elif isinstance(module, Linear):
        transposed = module.fan_in_fan_out
    else:
        raise ConfigError(
            f"the adapter on {path} is of kind {type(module).__name__}",
            "adapters on linear layers, embeddings and stacked experts",
            "Set export.merge=false, or leave it out of adapter.target_modules.",
        )
    return Adapted(
        lora_a, lora_b, magnitude, module.scaling[ADAPTER_NAME], bool(transposed), stacked
    )
