"""What was trained as Hugging Face weights: streams with one parameter in memory at a time.

1. `plan_model` lays the output out: the tensors of the base folder, in their order and under their
   names, and one more where training took tied weights apart.
2. `model_weights` streams: a tensor that nothing changed from the base files, another from the
   checkpoint or from both, cast once at the end.

`adapter_weights` streams the adapter alone, as peft names it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_dist.engine.export.merge import merge_expert_lora_, merge_lora_
from dpo_dist.engine.export.weight_changes import (
    POLICY,
    Adapted,
    Changes,
    Replaced,
    TrainedWeights,
)
from dpo_dist.engine.weights.adapter_file import name_in_file
from dpo_dist.engine.weights.base_weights import StoredModel, Tensors, WeightGroup
from dpo_dist.engine.weights.safetensors_reader import TensorSpec, read_tensor
from dpo_dist.engine.weights.safetensors_writer import TensorStream
from dpo_dist.errors import CheckpointError


@dataclass(frozen=True)
class ModelPlan:
    """The tensors of an exported model, known before any of them is read."""

    base: StoredModel
    changes: Changes
    specs: Mapping[str, TensorSpec]
    untied: Mapping[str, str]  # tensor that the base does not have -> its parameter

    @property
    def breaks_ties(self) -> bool:
        """Whether training made tied parameters differ."""
        return any(len({self.changes.get(n) for n in names}) > 1 for names in self.base.ties)


def adapter_weights(policy: Any, trained: TrainedWeights, dtype: torch.dtype) -> TensorStream:
    """The trained adapter under the names that peft saves and loads."""
    from peft import get_peft_model_state_dict

    sources = {name_in_file(name.removeprefix(POLICY)): name for name in trained.names_and_shapes}
    # peft would look the base model up on the hub to see whether the vocabulary grew
    expected = get_peft_model_state_dict(policy, save_embedding_layers=False)
    assert set(expected) == set(sources), sorted(set(expected) ^ set(sources))[:3]
    specs = {
        name: TensorSpec(dtype, tuple(trained.names_and_shapes[source]))
        for name, source in sources.items()
    }
    tensors = (
        (name, _finite(trained.read(source).to(dtype), source)) for name, source in sources.items()
    )
    return TensorStream(specs, tensors)


def plan_model(base: StoredModel, changes: Changes, dtype: torch.dtype | None) -> ModelPlan:
    """Lays out the exported model: names and shapes of the base, floating tensors as `dtype`.

    What the base keeps in a wider type than the rest (a router's bias, say) stays in that type;
    without a `dtype` every tensor stays in its own.
    """
    main = base.main_dtype
    specs = {
        name: TensorSpec(export_dtype(main, place.spec.dtype, dtype), place.spec.shape)
        for name, place in base.places.items()
    }
    untied = {}
    for names in base.ties:
        if len({changes.get(name) for name in names}) == 1:
            continue
        for parameter in names:
            if not any(parameter in group.parameters for group in base.groups):
                tensor = base.file_name_of(parameter)
                assert tensor not in specs, f"{tensor} is in the base folder"
                shape = tuple(base.skeleton.get_parameter(parameter).shape)
                specs[tensor] = TensorSpec(dtype or main, shape)
                untied[tensor] = parameter
    return ModelPlan(base, changes, specs, untied)


def model_weights(plan: ModelPlan, trained: TrainedWeights) -> TensorStream:
    """The whole model; a tensor that is not finite ends the stream with CheckpointError."""
    return TensorStream(plan.specs, _tensors(plan, trained))


def _tensors(plan: ModelPlan, trained: TrainedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output once, in its final type."""
    base = plan.base
    for group in base.groups:
        if not any(name in plan.changes for name in group.parameters):
            yield from _copies(plan, group.tensors)
            continue
        values = base.to_tensors(group, _changed(plan, group, group.parameters, trained))
        for name in list(values):
            yield name, _finite(values.pop(name).to(plan.specs[name].dtype), name)
    yield from _copies(plan, base.unread)
    for name, parameter in plan.untied.items():
        group = base.group_of(parameter)
        assert group is not None, f"{parameter} is tied to nothing in the base folder"
        value = _changed(plan, group, (parameter,), trained).pop(parameter)
        yield name, _finite(value.to(plan.specs[name].dtype), name)


def _copies(plan: ModelPlan, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        yield name, read_tensor(plan.base.places[name]).to(plan.specs[name].dtype)


def _changed(
    plan: ModelPlan, group: WeightGroup, parameters: Sequence[str], trained: TrainedWeights
) -> Tensors:
    """Trained values of parameters in float32; `group` holds their base values.

    A parameter that is not in its group shares the base value of one that is.
    """
    stored: Tensors = {}
    if not all(isinstance(plan.changes.get(name), Replaced) for name in parameters):
        stored = plan.base.read_parameters(group)
    values: Tensors = {}
    for name in parameters:
        change = plan.changes.get(name)
        if isinstance(change, Replaced):
            values[name] = trained.read(change.source)
            continue
        own = next(n for n in (name, *plan.base.tied_to(name)) if n in stored)
        values[name] = stored.pop(own)
        if change is not None:
            _merge_(values[name], change, trained)
    return values


def _merge_(weight: torch.Tensor, change: Adapted, trained: TrainedWeights) -> None:
    lora_a, lora_b = trained.read(change.lora_a), trained.read(change.lora_b)
    if change.stacked:
        merge_expert_lora_(weight, lora_a, lora_b, change.scaling, transposed=change.transposed)
        return
    magnitude = trained.read(change.magnitude) if change.magnitude else None
    merge_lora_(
        weight, lora_a, lora_b, change.scaling, transposed=change.transposed, magnitude=magnitude
    )


def export_dtype(main: torch.dtype, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type of an exported tensor that the base, mostly of type `main`, has as `stored`."""
    if dtype is None or not stored.is_floating_point:
        return stored
    wider = stored.itemsize > max(main.itemsize, dtype.itemsize)
    return stored if wider else dtype


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor itself; aminmax, unlike isfinite, needs no memory of the tensor's size."""
    if tensor.numel() and tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(
                f"{name} is not finite as {str(tensor.dtype).removeprefix('torch.')}",
                "finite weights",
                "Training diverged: name an earlier checkpoint in export.checkpoint, and train "
                "again with a lower train.learning_rate.",
            )
    return tensor
