"""What a run's memory depends on, read from its config and model without weights or a GPU.

Imports torch only where a model has to be built to be counted: `plan` answers at once otherwise.
"""

import contextlib
from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.sharding.ds_config import check_optimizer, read_sharding
from dpo_dist.model_files.files import (
    TOKENIZER_FILES,
    read_model_config,
    resolve_model_dir,
    vocab_size_of,
)
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.model_files.rope import length_bound_kinds
from dpo_dist.planning.known_layouts import known_shape
from dpo_dist.planning.setup import LOGITS_PER_CHUNK, ModelShape, Setup, Sharding, sharding_of

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "auto": 4}  # auto: at most


def make_setup(config: RunConfig, world_size: int) -> Setup:
    """What the memory of a rank of this run depends on; ConfigError when it could not train."""
    settings, dtype = config.train, config.model.dtype
    check_optimizer(settings, dtype, read_sharding(settings.deepspeed))
    return Setup(
        shape=count_shape(config, config.adapter),
        sharding=sharding_named(settings.deepspeed),
        world_size=world_size,
        dtype_bytes=DTYPE_BYTES[dtype],
        micro_batch_tokens=settings.micro_batch_tokens,
        scoring_tokens=config.scoring_tokens if config.data.holds_out else 0,
        logits_per_chunk=LOGITS_PER_CHUNK,
        checkpointing=settings.gradient_checkpointing,
        dropout=config.adapter is not None and config.adapter.dropout > 0,
        padded=config.model.layout == "padded",
        optimizer=settings.optimizer,
        copies_checkpoints=config.checkpoint.mode == "async",
        mlp_tile=settings.tiled_mlp or 0,
        offload_activations=settings.offload_activations,
        ranks_per_row=settings.sequence_parallel,
    )


def sharding_named(name: str) -> Sharding:
    """The sharding of a DeepSpeed JSON, by built-in name or path."""
    return sharding_of(read_sharding(name))


def without_quantization(config: RunConfig) -> RunConfig:
    """The config of a model that was merged after QLoRA."""
    model = config.model.model_copy(update={"quantization": None})
    return config.model_copy(update={"model": model})


def count_shape(
    config: RunConfig, adapter: AdapterSection | None, path: str | None = None
) -> ModelShape:
    """The shape of the run's base model, or of the one at `path`, with an adapter."""
    quantized, start, vocab_size = config.model.quantization is not None, None, None
    if path is not None:
        model_dir = _config_dir(path, None)
    else:
        model_dir = _config_dir(config.model.path, config.model.revision)
        start = RunModels(config).start_adapter if adapter is not None else None
        vocab_size = own_vocab_size(config, model_dir)
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "quantized": quantized}
    if start is None:
        known = known_shape(read_model_config(model_dir), adapter, **sizes)
        if known is not None:
            return known
    from dpo_dist.engine.model.model_shape import count_model  # seconds of imports

    return count_model(model_dir, adapter, config.model.trust_remote_code, start=start, **sizes)


def shares_prompts(config: RunConfig) -> bool:
    """Whether pairs may share a prompt in this model, as far as its config.json tells."""
    settings = read_model_config(_config_dir(config.model.path, config.model.revision))
    return not length_bound_kinds(settings.get("text_config") or settings)


def own_vocab_size(config: RunConfig, model_dir: Path) -> int | None:
    """Rows of lengthened embeddings; without a tokenizer here as if every added token were new."""
    model, num_rows = config.model, vocab_size_of(model_dir)
    if num_rows is None or not (model.add_tokens or model.pad_vocab_to_multiple):
        return None
    from dpo_dist.data.tokens.vocabulary import extended_tokenizer
    from dpo_dist.engine.export.own_base import padded_size

    num_tokens = num_rows + len(model.add_tokens)
    if any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        _, vocabulary = extended_tokenizer(model_dir, model.add_tokens, model.trust_remote_code)
        num_tokens = vocabulary.num_tokens
    return padded_size(num_rows, num_tokens, model.pad_vocab_to_multiple)


def _config_dir(path: str, revision: str | None) -> Path:
    """A folder with the model's config.json; of a hub id that one file is downloaded, no weights.

    Raises ModelFilesError when there is no such folder and the hub gives none.
    """
    if not Path(path).expanduser().exists():
        from huggingface_hub import hf_hub_download

        # Whatever is wrong, resolve_model_dir finds it again and says what to do.
        with contextlib.suppress(Exception):
            return Path(hf_hub_download(path, "config.json", revision=revision)).parent
    return resolve_model_dir(path, revision)
