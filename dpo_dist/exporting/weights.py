"""The weights of an export folder, streamed from the base model and the checkpoint."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.data.tokens.render import end_of_turn
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.engine.checkpoints.shard_reader import ShardedCheckpoint, open_checkpoint
from dpo_dist.engine.export.weight_changes import adapter_changes, check_adapter, full_changes
from dpo_dist.engine.export.weight_streams import adapter_weights, model_weights, plan_model
from dpo_dist.engine.model.adapters import add_adapter, write_adapter_config
from dpo_dist.engine.weights.base_weights import build_skeleton
from dpo_dist.engine.weights.safetensors_writer import Advance, write_file, write_shards
from dpo_dist.errors import ArtifactError
from dpo_dist.exporting.job import ExportJob
from dpo_dist.model_files.adapter import ADAPTER_WEIGHTS_NAME
from dpo_dist.model_files.files import CONFIG_NAME, copy_files, model_config, read_model_config
from dpo_dist.model_files.of_run import makes_base
from dpo_dist.run.exports import ExportKind
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import FileRecord, write_json
from dpo_dist.run.stop_flag import Stopped

MIB = 1 << 20
GENERATION_CONFIG_NAME = "generation_config.json"


def write_weights(job: ExportJob, kind: ExportKind, folder: Path) -> dict[str, FileRecord]:
    """Writes weights and model config of one folder; the records of the weight files.

    Raises Stopped at a signal, ArtifactError when the disk has no room for them.
    """
    with open_checkpoint(job.checkpoint_dir, verified=True) as trained:
        if kind == "adapter":
            return _write_adapter(job, trained, folder)
        return _write_model(job, trained, folder)


def _write_adapter(
    job: ExportJob, trained: ShardedCheckpoint, folder: Path
) -> dict[str, FileRecord]:
    policy = _adapted_skeleton(job)
    check_adapter(policy, trained)
    stream = adapter_weights(policy, trained, job.adapter_dtype)
    with _progress(job, folder, "adapter", stream.num_bytes) as advance:
        record = write_file(folder / ADAPTER_WEIGHTS_NAME, stream, advance)
    model = job.config.model
    local = makes_base(job.config) or Path(model.path).expanduser().exists()
    name, revision = (str(job.models.base), None) if local else (model.path, model.revision)
    write_adapter_config(policy, folder, job.config.export.base_model or name, revision)
    return {ADAPTER_WEIGHTS_NAME: record}


def _write_model(job: ExportJob, trained: ShardedCheckpoint, folder: Path) -> dict[str, FileRecord]:
    base = job.stored_base
    if job.config.adapter is None:
        changes = full_changes(base, trained)
    else:
        changes = adapter_changes(base, _adapted_skeleton(job), trained)
    plan = plan_model(base, changes, job.dtype)
    stream = model_weights(plan, trained)
    max_shard_bytes = job.config.export.max_shard_size_mib * MIB
    with _progress(job, folder, "model", stream.num_bytes) as advance:
        records = write_shards(folder, stream, max_shard_bytes, advance)
    config = model_config(read_model_config(base.folder), job.dtype_name("full"), plan.breaks_ties)
    write_json(folder / CONFIG_NAME, config)
    remote_code = ["*.py"] if job.config.model.trust_remote_code else []
    copy_files(base.folder, folder, (GENERATION_CONFIG_NAME, *remote_code))
    _stop_at_the_end_of_a_turn(job, folder / GENERATION_CONFIG_NAME)
    return records


def _stop_at_the_end_of_a_turn(job: ExportJob, path: Path) -> None:
    """Lists what the run's chat template writes behind an answer among the tokens that end one.

    A base model's file names its end of text only, and servers would generate to their limit.
    """
    remote = job.config.model.trust_remote_code
    end = end_of_turn(load_tokenizer(job.models.base, job.template, remote))
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    listed = settings.get("eos_token_id", read_model_config(job.models.base).get("eos_token_id"))
    stops = [
        token for token in (listed if isinstance(listed, list) else [listed]) if token is not None
    ]
    if end is not None and end not in stops:
        write_json(path, settings | {"eos_token_id": [*stops, end]})


def _adapted_skeleton(job: ExportJob) -> Any:
    adapter, base_dir = job.config.adapter, job.models.base
    assert adapter is not None, "the run trains all parameters"
    skeleton = build_skeleton(base_dir, job.config.model.trust_remote_code)
    return add_adapter(skeleton, adapter, str(base_dir), job.models.start_adapter)


@contextlib.contextmanager
def _progress(job: ExportJob, folder: Path, what: str, num_bytes: int) -> Iterator[Advance]:
    """A bar over the bytes to write, if the disk has room for them; stops at a signal."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ArtifactError(
            f"{folder.parent} has {free / MIB:,.0f} MiB free",
            f"{num_bytes / MIB:,.0f} MiB for the exported {what}",
            "Free some space, or choose export.dtype=bfloat16.",
        )
    with progress_bar("MiB") as bar:
        task = bar.add_task(f"export {what}", total=num_bytes / MIB)

        def advance(written: int) -> None:
            bar.advance(task, written / MIB)
            if job.stop:
                raise Stopped(f"export stopped by {job.stop.signal_name}")

        yield advance
