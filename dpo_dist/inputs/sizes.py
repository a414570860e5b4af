"""What a run's memory and disk depend on, found out without weights or a GPU.

For the planner, for the doctor, and for the stages that load a model, which look before they do.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.run_config import RunConfig, scoring_budget
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.data.batches import check_token_budget, num_steps
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.data.tokens.vocabulary import extended_tokenizer
from dpo_dist.engine.export.own_base import padded_size
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.engine.sharding.ds_config import check_optimizer, read_sharding
from dpo_dist.errors import DataError
from dpo_dist.extras import require_bitsandbytes
from dpo_dist.metrics import wandb_log
from dpo_dist.model_files.files import TOKENIZER_FILES, resolve_model_dir, vocab_size_of
from dpo_dist.model_files.of_run import makes_base, start_adapter_dir
from dpo_dist.objective.logprobs import LOGITS_BUDGET
from dpo_dist.planning import estimate
from dpo_dist.planning.estimate import Line, ModelShape, Setup, Sharding
from dpo_dist.reference.contract import store_root
from dpo_dist.reference.parts import ROW_DTYPE
from dpo_dist.run.run_dir import RunDir

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "auto": 4}  # auto: at most


@dataclass(frozen=True)
class Work:
    """The prepared pairs of both splits and the optimizer steps that they make."""

    train: Pairs
    held_out: Pairs
    num_steps: int


def make_setup(config: RunConfig, world_size: int) -> Setup:
    """What the memory of a rank of this run depends on; ConfigError when it could not train."""
    settings, dtype = config.train, config.model.dtype
    check_optimizer(settings, dtype, read_sharding(settings.deepspeed))
    return Setup(
        shape=count_shape(config, config.adapter),
        sharding=read_sizes(settings.deepspeed),
        world_size=world_size,
        dtype_bytes=DTYPE_BYTES[dtype],
        micro_batch_tokens=settings.micro_batch_tokens,
        scoring_tokens=scoring_budget(config) if config.data.holds_out else 0,
        logits_per_chunk=LOGITS_BUDGET,
        checkpointing=settings.gradient_checkpointing,
        dropout=config.adapter is not None and config.adapter.dropout > 0,
        padded=config.model.layout == "padded",
        optimizer=settings.optimizer,
    )


def read_sizes(name: str) -> Sharding:
    """The sizes in a DeepSpeed JSON, by built-in name or path."""
    return estimate.sharding_of(read_sharding(name))


def count_shape(
    config: RunConfig, adapter: AdapterSection | None, path: str | None = None
) -> ModelShape:
    """The shape of the run's base model, or of the one at `path`, with an adapter."""
    remote, quantized = config.model.trust_remote_code, config.model.quantization is not None
    if path is not None:
        return count_model(_config_dir(path, None), adapter, remote, quantized=quantized)
    model_dir = _config_dir(config.model.path, config.model.revision)
    start = start_adapter_dir(config) if adapter is not None else None
    vocab_size = _vocab_size(config, model_dir)
    return count_model(
        model_dir, adapter, remote, start=start, vocab_size=vocab_size, quantized=quantized
    )


def _vocab_size(config: RunConfig, model_dir: Path) -> int | None:
    """Rows of lengthened embeddings; without a tokenizer here as if every added token were new."""
    model, num_rows = config.model, vocab_size_of(model_dir)
    if num_rows is None or not (model.add_tokens or model.pad_vocab_to_multiple):
        return None
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


def prepared_work(config: RunConfig) -> Work | None:
    """The prepared pairs, None when there are none yet.

    Raises DataError when they are too few for a step or too long for a micro-batch.
    """
    return _open_work(config) if RunDir(config.run.dir).pairs_dir.is_dir() else None


def checked_work(config: RunConfig) -> Work:
    """The prepared pairs, once nothing is left that training would refuse without a model.

    The reference pass asks too: what comes after hours of it is found before them. Raises
    ArtifactError without pairs, DataError when they do not suffice, ConfigError when the
    sharding or the optimizer is wrong or an optional package is missing.
    """
    settings, model = config.train, config.model
    check_optimizer(settings, model.dtype, read_sharding(settings.deepspeed))
    if model.quantization is not None:
        require_bitsandbytes(f"model.quantization: {model.quantization}")
    if "8bit" in settings.optimizer or "paged" in settings.optimizer:
        require_bitsandbytes(f"train.optimizer: {settings.optimizer}")
    if config.logging.wandb:
        wandb_log.check_installed()
    work = _open_work(config)
    _check_held_out(config, work.held_out)
    return work


def _open_work(config: RunConfig) -> Work:
    pairs_dir, settings = RunDir(config.run.dir).pairs_dir, config.train
    train, held_out = (open_pairs(pairs_dir, split) for split in ("train", "eval"))
    check_token_budget(train.packed_lengths, range(len(train)), settings.micro_batch_tokens)
    steps = num_steps(len(train), settings.global_batch_size, settings.num_epochs)
    return Work(train, held_out, min(steps, settings.max_steps or steps))


def _check_held_out(config: RunConfig, held_out: Pairs) -> None:
    """Raises DataError when a setting needs held-out pairs and there are none."""
    needy = {
        "checkpoint.best_by": config.checkpoint.best_by,
        "eval.samples_every_steps": config.eval.samples_every_steps,
    }
    for key, value in needy.items():
        if value is not None and not len(held_out):
            raise DataError(
                f"{key} is {value}, and there are no held-out pairs",
                "at least one",
                "Set data.eval or data.eval_fraction and prepare the pairs in another run.dir, "
                f"or set {key} to null.",
            )


def disk_lines(config: RunConfig, setup: Setup, work: Work | None) -> list[Line]:
    """What the run writes, as far as it is known: pairs and store once they are prepared."""
    lines: list[Line] = []
    if work is not None:
        files = RunDir(config.run.dir).pairs_dir.rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        count, row_bytes = len(work.train) + len(work.held_out), ROW_DTYPE.itemsize
        why = f"{row_bytes} bytes x {count:,} pairs, in {store_root(config)}"
        lines = [Line("pairs", size, "as prepared")]
        if not config.objective.reference_free:
            lines.append(Line("reference_store", row_bytes * count, why))
    if makes_base(config):
        shape, each = setup.shape, DTYPE_BYTES[config.model.dtype]
        base = shape.num_parameters - (shape.num_trained if config.adapter else 0)
        why = f"{each} bytes x {base:,} parameters, in {RunDir(config.run.dir).base_dir}"
        lines.append(Line("base_model", each * base, why))
    export, adapter = config.export, config.adapter is not None
    exported = estimate.export_lines(setup.shape, DTYPE_BYTES[export.dtype], adapter, export.merge)
    num_kept = config.checkpoint.keep + (config.checkpoint.best_by is not None)
    return [*lines, estimate.checkpoint_line(setup, num_kept), *exported]
