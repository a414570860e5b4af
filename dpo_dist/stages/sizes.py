"""What a run's memory and disk depend on, found out without weights or a GPU.

For the planner and for the doctor, which looks before the expensive stages.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dpo_dist import estimate
from dpo_dist.config import RunConfig
from dpo_dist.data.batches import check_token_budget, num_steps
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.ds_config import read_sharding
from dpo_dist.engine.model_shape import count_model
from dpo_dist.estimate import Line, ModelShape, Setup, Sharding
from dpo_dist.model_files import resolve_model_dir
from dpo_dist.objective.logprobs import LOGITS_BUDGET
from dpo_dist.plan import scoring_budget, store_root
from dpo_dist.reference_parts import ROW_DTYPE
from dpo_dist.run_dir import RunDir
from dpo_dist.sections.training import AdapterSection

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """The prepared pairs of both splits and the optimizer steps that they make."""

    train: Pairs
    held_out: Pairs
    num_steps: int


def make_setup(config: RunConfig, world_size: int) -> Setup:
    """What the memory of a rank of this run depends on."""
    return Setup(
        shape=count_shape(config, config.adapter),
        sharding=read_sizes(config.train.deepspeed),
        world_size=world_size,
        dtype_bytes=DTYPE_BYTES[config.model.dtype],
        micro_batch_tokens=config.train.micro_batch_tokens,
        scoring_tokens=scoring_budget(config) if config.data.eval else 0,
        logits_per_chunk=LOGITS_BUDGET,
        checkpointing=config.train.gradient_checkpointing,
        dropout=config.adapter is not None and config.adapter.dropout > 0,
        padded=config.model.layout == "padded",
    )


def read_sizes(name: str) -> Sharding:
    """The sizes in a DeepSpeed JSON, by built-in name or path."""
    return estimate.sharding_of(read_sharding(name))


def count_shape(
    config: RunConfig, adapter: AdapterSection | None, path: str | None = None
) -> ModelShape:
    """The shape of the base model, or of the one at `path`, with an adapter."""
    revision = config.model.revision if path is None else None
    model_dir = _config_dir(path or config.model.path, revision)
    return count_model(model_dir, adapter, config.model.trust_remote_code)


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
    pairs_dir = RunDir(config.run.dir).pairs_dir
    if not pairs_dir.is_dir():
        return None
    train, held_out = (open_pairs(pairs_dir, split) for split in ("train", "eval"))
    settings = config.train
    check_token_budget(train.packed_lengths, range(len(train)), settings.micro_batch_tokens)
    steps = num_steps(len(train), settings.global_batch_size, settings.num_epochs)
    return Work(train, held_out, min(steps, settings.max_steps or steps))


def disk_lines(config: RunConfig, setup: Setup, work: Work | None) -> list[Line]:
    """What the run writes, as far as it is known: pairs and store once they are prepared."""
    lines: list[Line] = []
    if work is not None:
        files = RunDir(config.run.dir).pairs_dir.rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        count, row_bytes = len(work.train) + len(work.held_out), ROW_DTYPE.itemsize
        why = f"{row_bytes} bytes x {count:,} pairs, in {store_root(config)}"
        lines = [
            Line("pairs", size, "as prepared"),
            Line("reference_store", row_bytes * count, why),
        ]
    export, adapter = config.export, config.adapter is not None
    exported = estimate.export_lines(setup.shape, DTYPE_BYTES[export.dtype], adapter, export.merge)
    return [*lines, estimate.checkpoint_line(setup, config.checkpoint.keep), *exported]
