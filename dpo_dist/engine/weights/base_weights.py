"""The weights of a base folder: their names in its files, and in the module they are loaded into.

Mostly the two are the same name. Where they are not, transformers converts while loading: it
renames (GPT-NeoX: `embed_out` is `lm_head`) or it fuses (Mixtral: the `w1` and `w3` of all experts
are one `gate_up_proj`). Here the same rules match the headers of the files with a model on the
meta device, group by group, and the way back is tried on shapes before a byte is written.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_dist.engine.weights.safetensors_reader import Place, read_places, read_tensor
from dpo_dist.errors import ModelFilesError
from dpo_dist.model_files.files import read_model_config, weight_files

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightGroup:
    """Parameters of the module and the tensors of the files that hold the same numbers.

    One of each, unless transformers converts them.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    converter: Any = None  # transformers' WeightConverter, None when only the name may differ
    patterns: tuple[str, ...] = ()  # the converter's source pattern of each tensor


@dataclass(frozen=True)
class StoredModel:
    """Headers of a base folder, matched with the model they belong to."""

    folder: Path
    skeleton: Any  # the model on the meta device
    places: Mapping[str, Place]  # by name in the files
    groups: tuple[WeightGroup, ...]
    unread: tuple[str, ...]  # tensors that loading leaves aside
    ties: tuple[tuple[str, ...], ...]  # names of one and the same parameter

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating type of most bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for place in self.places.values():
            if place.spec.dtype.is_floating_point:
                sizes[place.spec.dtype] += place.spec.num_bytes
        return sizes.most_common(1)[0][0]

    def tied_to(self, parameter: str) -> tuple[str, ...]:
        """All names of a parameter, itself among them."""
        return next((names for names in self.ties if parameter in names), (parameter,))

    def group_of(self, parameter: str) -> WeightGroup | None:
        """The group that holds a parameter, under another of its names if need be."""
        for name in (parameter, *self.tied_to(parameter)):
            for group in self.groups:
                if name in group.parameters:
                    return group
        return None

    def read_parameters(self, group: WeightGroup) -> Tensors:
        """A group as loading makes it, in float32, by name in the module."""
        tensors = {name: read_tensor(self.places[name]).float() for name in group.tensors}
        return _convert(group, tensors, self.skeleton)

    def to_tensors(self, group: WeightGroup, parameters: Tensors) -> Tensors:
        """The way back: a group by name in the files."""
        if group.converter is None:
            return {group.tensors[0]: parameters[group.parameters[0]]}
        return _revert(parameters, self.skeleton)

    def file_name_of(self, parameter: str) -> str:
        """How a parameter would be called in the files, for one that they do not hold yet."""
        (name,) = _revert({parameter: torch.empty(0, device="meta")}, self.skeleton)
        return name


def open_base(model_dir: Path, trust_remote_code: bool = False) -> StoredModel:
    """Reads the headers of a base folder; raises ModelFilesError when they do not fit its model."""
    refuse_quantized(model_dir)
    files = weight_files(model_dir, allow_pickle=True)
    if files[0].suffix != ".safetensors":
        raise ModelFilesError(
            f"{model_dir} has pickled weights only ({files[0].name})",
            "safetensors, whose headers tell the names and shapes of the export",
            "Load it with transformers, save_pretrained it elsewhere and train from that folder; "
            "an adapter exports without this under export.merge=false.",
        )
    places = read_places(files)
    skeleton = build_skeleton(model_dir, trust_remote_code)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found, unread = _match(places, skeleton, shapes)
    groups = tuple(_settle(group, places, shapes, skeleton, model_dir) for group in found)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    ties = tuple(tuple(same) for same in names.values() if len(same) > 1)
    return StoredModel(model_dir, skeleton, places, groups, unread, ties)


def refuse_quantized(model_dir: Path) -> None:
    """Raises ModelFilesError for a base whose files hold quantized weights."""
    quantization = read_model_config(model_dir).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown method")
        raise ModelFilesError(
            f"{model_dir} holds quantized weights ({method})",
            "weights in float32, bfloat16 or float16",
            "Set model.path to the original of the model; model.quantization=nf4 packs it while "
            "it is loaded.",
        )


def build_skeleton(
    model_dir: Path, trust_remote_code: bool = False, vocab_size: int | None = None
) -> Any:
    """The causal LM of a folder on the meta device: modules, names and shapes without weights.

    The folder may hold config.json alone; `vocab_size` is that of lengthened embeddings. Raises
    ModelFilesError when transformers cannot build a causal LM from it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_model_config(model_dir)
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        if vocab_size is not None:
            config.get_text_config().vocab_size = vocab_size
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each family complains of a bad config in its own way
        raise ModelFilesError(
            f"{model_dir / 'config.json'} is of no model that transformers can build "
            f"({' '.join(str(error).split())[:200]})",
            "a causal language model",
            "Check model.path, or upgrade transformers.",
        ) from None


def _match(
    places: Mapping[str, Place], skeleton: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[WeightGroup, ...], tuple[str, ...]]:
    """(groups in the order of the files, tensors without a place in the module).

    Follows what `from_pretrained` does: renamings, then at most one converter, then the prefix of
    the inner model put on or taken off. Leaves the conversions that were used on the skeleton,
    where transformers looks for them on the way back.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(skeleton)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix, known = skeleton.base_model_prefix, skeleton.state_dict()
    found: defaultdict[str, list[tuple[str, str | None]]] = defaultdict(list)
    unread = []
    for name in sorted(places, key=dot_natural_key):  # stacked experts depend on the order
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target in shapes:
            found[target].append((name, pattern))
        else:
            unread.append(name)
    skeleton._weight_conversions = [t for t in transforms if t.was_used()]
    order = {name: position for position, name in enumerate(places)}
    groups = []
    for target, members in found.items():
        pattern = members[0][1]
        group = WeightGroup(
            (target,),
            tuple(name for name, _ in members),
            of_pattern[pattern] if pattern else None,
            tuple(pattern or "" for _, pattern in members),
        )
        groups.append(group)
    groups.sort(key=lambda group: min(order[name] for name in group.tensors))
    return tuple(groups), tuple(unread)


def _settle(
    group: WeightGroup,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: Any,
    model_dir: Path,
) -> WeightGroup:
    """The group with all its parameters, which only a conversion tells.

    Converts shapes there and back; raises ModelFilesError when they do not come out the same.
    """
    stored = {name: places[name].spec.shape for name in group.tensors}
    try:
        there = _convert(group, _on_meta(stored), skeleton)
        got = {name: tuple(tensor.shape) for name, tensor in there.items()}
        back = _revert(there, skeleton) if group.converter else _on_meta(stored)
        same = {name: tuple(tensor.shape) for name, tensor in back.items()} == stored
    except Exception as error:  # whatever an operation of transformers thinks of these shapes
        got, same = {"error": repr(error)}, False
    expected = {name: shapes.get(name) for name in (got if same else group.parameters)}
    if got != expected or not same or (group.converter is None and len(stored) != 1):
        raise ModelFilesError(
            f"{model_dir}: {_shown(stored)} would load as {_shown(got)}",
            f"{_shown(expected)}, and the same tensors on the way back",
            "This model cannot be exported under the names of its base folder.",
        )
    return replace(group, parameters=tuple(got))


def _convert(group: WeightGroup, tensors: Tensors, skeleton: Any) -> Tensors:
    if group.converter is None:
        return {group.parameters[0]: tensors[group.tensors[0]]}
    converter, target = deepcopy(group.converter), group.parameters[0]
    for name, pattern in zip(group.tensors, group.patterns, strict=True):
        converter.add_tensor(target, name, pattern, tensors.pop(name))
    converted = converter.convert(target, model=skeleton, config=skeleton.config)
    return {n: t[0] if isinstance(t, list) else t for n, t in converted.items()}


def _revert(parameters: Tensors, skeleton: Any) -> Tensors:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(skeleton, parameters)


def _on_meta(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _shown(shapes: Mapping[str, Any]) -> str:
    items = [f"{name} {shape}" for name, shape in shapes.items()]
    return ", ".join(items[:2]) + (f", ... ({len(items)} in all)" if len(items) > 2 else "")
