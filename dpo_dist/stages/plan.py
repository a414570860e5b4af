"""What a run will need, before it runs: memory, steps, tokens, disk; no weights, no GPU.

1. `count_model` builds the model and its adapter without memory and counts their parameters.
2. `make_plan` puts them, the DeepSpeed JSON and the prepared pairs, if there are any, through the
   arithmetic of dpo_dist.estimate.
3. `print_plan` prints the rows, or all of them as JSON; `print_dry_run` adds the resolved config
   and the commands. Nothing is written.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dpo_dist import estimate
from dpo_dist.config import AdapterSection, RunConfig, to_yaml
from dpo_dist.data.batches import num_steps, plan_micro_batches, step_pair_indices
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.adapters import add_adapter
from dpo_dist.engine.ds_config import read_sharding
from dpo_dist.engine.model_parts import output_module
from dpo_dist.errors import ModelFilesError
from dpo_dist.estimate import GIB, RESERVE_BYTES, Line, Memory, ModelShape, Setup
from dpo_dist.local import LOOPBACK, count_gpus, count_workers
from dpo_dist.model_files import read_model_config
from dpo_dist.objective.logprobs import LOGITS_BUDGET
from dpo_dist.plan import STAGES, base_model_dir, scoring_budget, stage_argv, store_root
from dpo_dist.reference_parts import ROW_DTYPE
from dpo_dist.run_dir import RunDir
from dpo_dist.topology import Topology

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
STEPS_PACKED = 16  # optimizer steps whose micro-batches are counted
UNKNOWN = "after prepare"


@dataclass(frozen=True)
class Row:
    """A number under a key that names its unit; without a value `why` says what is missing."""

    key: str
    value: float | int | str | bool | None
    why: str = ""  # its arithmetic, or where it comes from


@dataclass(frozen=True)
class Plan:
    """Rows by section, and what would help where memory does not suffice."""

    sections: dict[str, list[Row]]
    fits: bool | None
    disk_fits: bool | None
    remedies: list[estimate.Remedy] = field(default_factory=list)


def print_plan(
    config: RunConfig, world_size: int | None, gpu_memory_gib: float | None, as_json: bool
) -> None:
    """Prints memory, steps, tokens and disk of a run on `world_size` ranks.

    Ranks and GPU memory are those of this machine unless given. Raises the errors that the stages
    would raise for the same config: model folder, DeepSpeed JSON, adapter, too few or too long pairs.
    """
    plan = make_plan(config, world_size, gpu_memory_gib)
    print(json.dumps(as_dict(plan), indent=2) if as_json else as_text(plan))


def print_dry_run(config: RunConfig, config_path: Path, overrides: Sequence[str]) -> None:
    """Prints the resolved config, the plan on this machine and the command of every rank."""
    num_ranks, _ = count_workers(config.local)
    print(f"# {config_path}, resolved\n{to_yaml(config)}")
    print(as_text(make_plan(config, None, None)))
    print("\ncommands")
    for stage in STAGES:
        ranks = num_ranks if stage.distributed else 1
        argv = shlex.join(stage_argv(stage.name, config_path, overrides))
        print(f"  {stage.name}: {stage.purpose}")
        for rank in range(ranks):
            topology = Topology(rank, ranks, rank, ranks, LOOPBACK, 0).environment()
            shown = topology | {list(topology)[-1]: "<a free port>"}
            print(f"    {' '.join(f'{name}={value}' for name, value in shown.items())} {argv}")


def make_plan(config: RunConfig, world_size: int | None, gpu_memory_gib: float | None) -> Plan:
    """The plan of a run; see `print_plan`."""
    if world_size is None:
        world_size, ranks_source = count_workers(config.local)
    else:
        ranks_source = "--world-size"
    limit_gib, limit_source = gpu_memory_gib, "--gpu-memory-gib"
    if limit_gib is None:
        limit_gib, limit_source = read_gpu_memory_gib(), "nvidia-smi"
    train, eval_ = prepared_pairs(RunDir(config.run.dir))
    shape = count_model(config, config.adapter)
    setup = make_setup(config, shape, world_size)
    memory = estimate.estimate(setup)
    limit = None if limit_gib is None else Row("limit_gib", limit_gib, limit_source)
    fits, memory_rows = _fit_rows(memory.peak_bytes, limit)
    steps, batches = _step_rows(config, setup, train)
    disk_fits, disk = _disk_rows(config, setup, train, eval_, steps)
    reference_fits, reference = _reference_rows(config, setup, limit)
    if reference_fits is False:
        fits = False
    sections = {
        "run": [
            Row("model", config.model.path),
            Row("num_parameters", shape.num_parameters),
            Row("num_trained_parameters", shape.num_trained, _trained_by(config)),
            Row("num_ranks", world_size, ranks_source),
            Row("zero_stage", setup.sharding.stage, f"train.deepspeed: {config.train.deepspeed}"),
            Row("dtype", config.model.dtype, "model.dtype"),
        ],
        "memory_per_gpu": [*_memory_rows(memory), *memory_rows],
        "memory_per_host": [_size_row(line) for line in memory.host],
        "reference_memory_per_gpu": reference,
        "batches": batches,
        "work": _work_rows(setup, steps, train, eval_),
        "disk": disk,
    }
    remedies = [] if fits is not False else _remedies(config, setup, train, limit_gib)
    return Plan({k: v for k, v in sections.items() if v}, fits, disk_fits, remedies)
