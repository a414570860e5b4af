"""The base model of a run whose config changes it: more tokens, an adapter merged in.

1. `lengthen` copies a model folder with more rows in its embeddings and its head.
2. `merge_start` folds an adapter into a model folder.

Both stream, one tensor in memory at a time, and write the same bytes whenever they are called.
V vocabulary, D hidden.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.export.weight_changes import POLICY, adapter_changes
from dpo_dist.engine.export.weight_streams import model_weights, plan_model
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.weights.adapter_file import AdapterWeights
from dpo_dist.engine.weights.base_weights import StoredModel, build_skeleton, open_base
from dpo_dist.engine.weights.safetensors_reader import read_tensor
from dpo_dist.engine.weights.safetensors_writer import TensorStream, write_shards
from dpo_dist.errors import ConfigError
from dpo_dist.model_files.files import (
    CONFIG_NAME,
    copy_files,
    model_config,
    read_model_config,
    with_vocab_size,
)
from dpo_dist.run.manifest import write_json

MAX_SHARD_BYTES = 4 << 30
ROWS_AT_ONCE = 4096
COPIED = ("generation_config.json", "*.py")


def padded_size(num_rows: int, num_tokens: int, multiple: int | None) -> int:
    """Rows of embeddings that have `num_rows` and need `num_tokens`, up to a multiple."""
    size = max(num_rows, num_tokens)
    return size if multiple is None else -(-size // multiple) * multiple


def lengthen(
    source: Path,
    folder: Path,
    num_tokens: int,
    new_ids: Sequence[int],
    multiple: int | None,
    trust_remote_code: bool = False,
) -> int:
    """Writes the model of `source` with embeddings for `num_tokens` tokens; returns their number.

    Rows of `new_ids` and rows that the model has not yet become the mean of the other tokens' rows
    (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html): no token is then likelier
    than an average one. Raises ModelFilesError when `source` is no model to stream, ConfigError
    when its embeddings are not stored as such.
    """
    base = open_base(source, trust_remote_code)
    tables = _vocabulary_tensors(base)
    num_rows = max(base.places[name].spec.shape[0] for name in tables)
    size = padded_size(num_rows, num_tokens, multiple)
    fresh = {*new_ids, *range(num_rows, size)}
    specs = {
        name: replace(place.spec, shape=(size, *place.spec.shape[1:]))
        if name in tables
        else place.spec
        for name, place in base.places.items()
    }
    tensors = (
        (
            name,
            _lengthened(read_tensor(place), size, fresh) if name in tables else read_tensor(place),
        )
        for name, place in base.places.items()
    )
    write_shards(folder, TensorStream(specs, tensors), MAX_SHARD_BYTES)
    write_json(folder / CONFIG_NAME, with_vocab_size(read_model_config(source), size))
    copy_files(source, folder, COPIED)
    open_base(folder, trust_remote_code)  # raises if config and tensors no longer fit
    return size


def merge_start(
    source: Path,
    folder: Path,
    adapter: AdapterSection,
    adapter_dir: Path,
    dtype: str,
    trust_remote_code: bool = False,
) -> None:
    """Writes the model of `source` with the adapter in `adapter_dir` folded in, as `dtype`.

    Raises ModelFilesError when the adapter is not one of this model.
    """
    base = open_base(source, trust_remote_code)
    skeleton = build_skeleton(source, trust_remote_code)
    policy = add_adapter(skeleton, adapter, str(source), adapter_dir)
    trained = AdapterWeights(adapter_dir, policy, POLICY)
    changes = adapter_changes(base, policy, trained)
    plan = plan_model(base, changes, getattr(torch, dtype))
    write_shards(folder, model_weights(plan, trained), MAX_SHARD_BYTES)
    config = read_model_config(source)
    write_json(folder / CONFIG_NAME, model_config(config, dtype, plan.breaks_ties))
    copy_files(source, folder, COPIED)


def check_new_tokens_train(
    folder: Path,
    adapter: AdapterSection,
    start: Path | None,
    trust_remote_code: bool = False,
) -> None:
    """Raises ConfigError when the adapter leaves embeddings or head, and so new tokens, frozen."""
    skeleton = build_skeleton(folder, trust_remote_code)
    names = [name for name, _ in _ends(skeleton)]
    base = base_of(add_adapter(skeleton, adapter, str(folder), start))
    frozen = [
        name
        for name in names
        if not any(parameter.requires_grad for parameter in base.get_submodule(name).parameters())
    ]
    if frozen:
        shown = ", ".join(name.rsplit(".", 1)[-1] for name in names)
        raise ConfigError(
            f"model.add_tokens: the adapter leaves {' and '.join(frozen)} frozen, so that the new "
            "tokens would all stay the same",
            "embeddings and head that train",
            f"Set adapter.modules_to_save to [{shown}]"
            + (" and adapter.start to merge." if start is not None else "."),
        )


def _ends(model: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of the input embeddings and of the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [(name, module) for name, module in model.named_modules() if module in ends]


def _vocabulary_tensors(base: StoredModel) -> set[str]:
    """Names in the files of what has a row for every token."""
    tables: set[str] = set()
    for name, module in _ends(base.skeleton):
        for own, _ in module.named_parameters(recurse=False):
            for parameter in base.tied_to(f"{name}.{own}"):
                group = next((g for g in base.groups if parameter in g.parameters), None)
                if group is not None and (group.converter or len(group.tensors) != 1):
                    raise ConfigError(
                        f"{base.folder} stores {parameter} in {len(group.tensors)} tensors",
                        "embeddings stored as one table",
                        "Resize the model with transformers and set model.path to the result.",
                    )
                tables |= set(group.tensors) if group is not None else set()
    return tables


def _lengthened(table: torch.Tensor, size: int, fresh: Collection[int]) -> torch.Tensor:
    """(V, D) or (V,) as (size, ...), its fresh rows the mean of the others."""
    known = torch.ones(size, dtype=torch.bool)
    known[list(fresh)] = False
    longer = table.new_empty((size, *table.shape[1:]))
    longer[: len(table)] = table
    parts = zip(table.split(ROWS_AT_ONCE), known[: len(table)].split(ROWS_AT_ONCE), strict=True)
    total = torch.stack([rows[kept].double().sum(dim=0) for rows, kept in parts]).sum(dim=0)
    longer[~known] = (total / known.sum()).to(table.dtype)
    return longer
