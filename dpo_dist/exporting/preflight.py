"""What the last stages would refuse, refused before the first one computes.

Everything an export needs is tried without weights: the model and its adapter on the meta device,
the export laid out as if they had been trained, the tokenizer through a copy. Of the weights only
the headers of their files are read.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.export.own_base import check_new_tokens_train
from dpo_dist.engine.export.weight_changes import POLICY, adapter_changes, full_changes
from dpo_dist.engine.export.weight_streams import adapter_weights, plan_model
from dpo_dist.engine.forward.model_parts import num_experts, output_module, train_text
from dpo_dist.engine.model.adapters import add_adapter, refuse_partitions_beside_adapted
from dpo_dist.engine.model.quantized import quantized_layers, refuse_trained_in
from dpo_dist.engine.sharding.ds_config import read_sharding, zero_stage
from dpo_dist.engine.weights.adapter_file import ADAPTER_NAME, AdapterWeights
from dpo_dist.engine.weights.base_weights import build_skeleton, open_base, refuse_quantized
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.exporting.folder import copy_tokenizer
from dpo_dist.inputs.setup import own_vocab_size
from dpo_dist.inputs.work import check_heads, check_settings
from dpo_dist.model_files.files import CONFIG_NAME, copy_files, weight_files
from dpo_dist.model_files.hub import require_token
from dpo_dist.model_files.of_run import RunModels, makes_base
from dpo_dist.run.exports import export_folders, pushed_kind

_SAMPLE = "Two words, 12.5 % \N{LATIN SMALL LETTER E WITH ACUTE}\N{CJK UNIFIED IDEOGRAPH-4E16}\n"


def preflight(models: RunModels) -> None:
    """Raises what train, export, verify or push would raise of this config and these model files.

    `prepare` begins with it. Raises ConfigError, ModelFilesError, DataError or HubError.
    """
    config = models.config
    check_settings(config)
    check_heads(models)
    weight_files(models.source, config.model.allow_pickle_weights)
    refuse_quantized(models.source)
    if config.reference.model is not None:
        weight_files(models.reference, config.model.allow_pickle_weights)
        refuse_quantized(models.reference)
        build_skeleton(models.reference, config.model.trust_remote_code)
    if config.adapter is None:
        _try_full_export(models)
    else:
        _try_adapter_exports(models)
    for kind in export_folders(config):
        _try_tokenizer(config, models.source, beside_model=kind != "adapter")
    if config.export.push_to_hub is not None:
        _try_push(config, config.export.push_to_hub)


def preflight_here(config: RunConfig) -> bool:
    """The same if the model is on this machine, which then is returned; nothing is downloaded."""
    here = Path(config.model.path).expanduser().is_dir()
    if here:
        preflight(RunModels(config))
    return here


class _AsTrained:
    """What trains in a skeleton, in place of a checkpoint of it."""

    def __init__(self, skeleton: Any) -> None:
        self.names_and_shapes: Mapping[str, tuple[int, ...]] = {
            POLICY + name: tuple(parameter.shape)
            for name, parameter in skeleton.named_parameters()
            if parameter.requires_grad
        }

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} has no values yet")


def _try_full_export(models: RunModels) -> None:
    config = models.config
    base = open_base(models.source, config.model.trust_remote_code)
    _check_parts(config, base.skeleton)
    train_text(base.skeleton)
    plan_model(base, full_changes(base, _AsTrained(base.skeleton)), None)


def _try_adapter_exports(models: RunModels) -> None:
    config, adapter, source = models.config, models.config.adapter, models.source
    assert adapter is not None
    remote, start = config.model.trust_remote_code, models.start_adapter
    if config.model.add_tokens:
        check_new_tokens_train(source, adapter, start, remote)
    skeleton = build_skeleton(source, remote, own_vocab_size(config, source))
    layers = quantized_layers(skeleton) if config.model.quantization else []
    packed = {name for name, p in skeleton.named_parameters() if any(p is m.weight for m in layers)}
    policy: Any = add_adapter(skeleton, adapter, str(source), start)
    _check_parts(config, policy)
    saved = f".modules_to_save.{ADAPTER_NAME}"
    refuse_trained_in(
        policy,
        [
            name
            for name, _ in policy.named_parameters()
            if name.removeprefix("base_model.model.").replace(saved, "") in packed
        ],
    )
    sharded = config.model.quantization is None and (
        zero_stage(read_sharding(config.train.deepspeed)) == 3
        or config.reference.sharding == "zero3"
    )
    refuse_partitions_beside_adapted(policy, all_partitioned=sharded)
    if start is not None:
        AdapterWeights(start, policy, POLICY)  # raises if they do not fit
    trained = _AsTrained(policy)
    adapter_weights(policy, trained, torch.float32)
    if config.export.merge:
        base = open_base(source, remote)
        plan_model(base, adapter_changes(base, policy, trained), None)


def _check_parts(config: RunConfig, policy: Any) -> None:
    output_module(policy)
    if config.objective.router_aux_loss_coef:
        num_experts(policy)


def _try_tokenizer(config: RunConfig, source: Path, *, beside_model: bool) -> None:
    """Raises DataError unless an export's copy of the tokenizer is the tokenizer."""
    template, remote = resolve_template(config.data.chat_template), config.model.trust_remote_code
    own = load_tokenizer(source, template, remote)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        copy_tokenizer(source, copy, template)
        if beside_model:
            copy_files(source, copy, [CONFIG_NAME, *(["*.py"] if remote else [])])
        try:
            found = load_tokenizer(copy, None, remote)
        except DataError:
            raise _incomplete(source, "does not load") from None
    if found.encode(_SAMPLE) != own.encode(_SAMPLE):
        raise _incomplete(source, "encodes differently")
    if found.chat_template != own.chat_template:
        raise _incomplete(source, "has another chat template")


def _incomplete(source: Path, found: str) -> DataError:
    return DataError(
        f"an export's copy of the tokenizer in {source} {found}",
        "a tokenizer that is whole in the files of a Hugging Face tokenizer",
        "Load it with AutoTokenizer and save_pretrained it into the model folder.",
    )


def _try_push(config: RunConfig, repository: str) -> None:
    require_token(repository)
    named = config.export.base_model or config.model.path
    own = makes_base(config) and config.export.base_model is None
    if pushed_kind(config) == "adapter" and (own or Path(named).expanduser().exists()):
        raise ConfigError(
            f"export.push_to_hub: {repository} with an adapter that names its base model by a "
            f"folder of this machine ({named})",
            "its hub id, with which others can load the adapter",
            "Set export.base_model=owner/name.",
        )
