"""What a run will need, before it runs: memory, steps, tokens, disk; no weights, no GPU.

1. Count the model and its adapter; read the DeepSpeed JSON, and the prepared pairs if there are any.
2. `make_plan` puts them through the arithmetic of dpo_dist.estimate, a `Row` for every number.
3. `print_plan` prints the rows or their JSON; `print_dry_run` adds the resolved config and the
   commands. Nothing is written.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist import estimate
from dpo_dist.config import AdapterSection, RunConfig, to_yaml
from dpo_dist.data.batches import (
    check_token_budget,
    num_steps,
    plan_micro_batches,
    step_pair_indices,
)
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.ds_config import read_sharding
from dpo_dist.engine.model_shape import count_model
from dpo_dist.estimate import GIB, RESERVE_BYTES, Line, Memory, ModelShape, Setup, Sharding, total
from dpo_dist.local import LOOPBACK, count_gpus, count_workers
from dpo_dist.model_files import resolve_model_dir
from dpo_dist.objective.logprobs import LOGITS_BUDGET
from dpo_dist.plan import STAGES, scoring_budget, stage_argv, store_root
from dpo_dist.reference_parts import ROW_DTYPE
from dpo_dist.remedies import Remedy, remedies
from dpo_dist.run_dir import RunDir
from dpo_dist.topology import Topology

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
STEPS_PACKED = 16  # optimizer steps whose micro-batches are counted
SHORTEST_MICRO_BATCH = 1024  # tokens a remedy goes down to while the pairs are unknown
NO_PAIRS = "known after `dpo-dist prepare`"


@dataclass(frozen=True)
class Row:
    """A value under a key that names its unit; `why` is its arithmetic, or why it is missing."""

    key: str
    value: float | str | None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Rows by section, whether they fit, and what would help where memory does not suffice."""

    sections: dict[str, list[Row]]
    fits: bool | None
    disk_fits: bool
    remedies: list[Remedy]


@dataclass(frozen=True)
class Work:
    """The prepared pairs of both splits and the optimizer steps that they make."""

    train: Pairs
    held_out: Pairs
    num_steps: int


def print_plan(
    config: RunConfig, world_size: int | None, gpu_memory_gib: float | None, as_json: bool
) -> None:
    """Prints memory, steps, tokens and disk of a run on `world_size` ranks.

    Ranks and GPU memory are those of this machine unless given. Raises what the stages would raise
    for the same config: ModelFilesError, ConfigError, DataError for too few or too long pairs.
    """
    plan = make_plan(config, world_size, gpu_memory_gib)
    print(json.dumps(as_dict(plan), indent=2) if as_json else as_text(plan))


def print_dry_run(config: RunConfig, config_path: Path, overrides: Sequence[str]) -> None:
    """Prints the resolved config, the plan on this machine, and the command of every stage."""
    plan = make_plan(config, None, None)
    print(f"{to_yaml(config)}\n{as_text(plan)}\n\ncommands")
    for stage in STAGES:
        ranks = count_workers(config.local)[0] if stage.distributed else 1
        variables = Topology(0, ranks, 0, ranks, LOOPBACK, 0).environment()
        variables["MASTER_PORT"] = "PORT"
        environment = " ".join(f"{name}={value}" for name, value in variables.items())
        print(f"  {stage.name}: {stage.purpose}")
        print(f"    {environment} {shlex.join(stage_argv(stage.name, config_path, overrides))}")
        if ranks > 1:
            print(f"    and {ranks - 1} more, with RANK and LOCAL_RANK up to {ranks - 1}")
    print("  PORT is one that is free when the stage starts")


def make_plan(config: RunConfig, world_size: int | None, gpu_memory_gib: float | None) -> Plan:
    """The plan of a run; arguments and errors as those of `print_plan`."""
    ranks, ranks_why = count_workers(config.local)
    if world_size is not None:
        ranks, ranks_why = world_size, "--world-size"
    limit_gib = _gpu_memory_gib() if gpu_memory_gib is None else gpu_memory_gib
    setup = make_setup(config, _count(config, config.adapter), ranks)
    work = _prepared_work(config)
    memory = estimate.estimate(setup)
    reference = _reference_rows(config, setup, limit_gib)
    disk = _disk_rows(config, setup, work)
    sections = {
        "run": _run_rows(config, setup, ranks_why),
        "memory of a GPU": list(_memory_rows(memory, limit_gib)),
        "memory of a host": [_size(line) for line in memory.host],
        "reference pass": reference,
        "batches": list(_batch_rows(config, setup, work)),
        "work": list(_work_rows(config, setup, work)),
        "disk": disk,
    }
    fits = _fits(memory.peak_bytes, limit_gib)
    changes: list[Remedy] = []
    if limit_gib is not None and not fits:
        changes = _remedies(config, setup, work, limit_gib)
    if reference[-1].value is False:
        fits = False
    return Plan(
        {title: rows for title, rows in sections.items() if rows},
        fits,
        disk[-1].value is True,
        changes,
    )


def make_setup(config: RunConfig, shape: ModelShape, world_size: int) -> Setup:
    """What the memory of a rank of this run depends on."""
    return Setup(
        shape=shape,
        sharding=_sharding(config.train.deepspeed),
        world_size=world_size,
        dtype_bytes=DTYPE_BYTES[config.model.dtype],
        micro_batch_tokens=config.train.micro_batch_tokens,
        scoring_tokens=scoring_budget(config) if config.data.eval else 0,
        logits_per_chunk=LOGITS_BUDGET,
        checkpointing=config.train.gradient_checkpointing,
        dropout=config.adapter is not None and config.adapter.dropout > 0,
        padded=config.model.layout == "padded",
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything for `--json`: values by section, and the arithmetic of each under its own key."""
    names = {title: title.replace(" of a ", "_per_").replace(" ", "_") for title in plan.sections}
    sections = {names[title].lower(): rows for title, rows in plan.sections.items()}
    return {
        "fits": plan.fits,
        "disk_fits": plan.disk_fits,
        "remedies": [
            {"change": r.change, "peak_gib": r.peak_bytes / GIB, "fits": r.fits}
            for r in plan.remedies
        ],
        **{name: {row.key: row.value for row in rows} for name, rows in sections.items()},
        "arithmetic": {
            f"{name}.{row.key}": row.why for name, rows in sections.items() for row in rows if row.why
        },
    }


def as_text(plan: Plan) -> str:
    """The plan for a terminal: a line a row, value and arithmetic."""
    lines: list[str] = []
    for title, rows in plan.sections.items():
        lines += ["", title]
        for row in rows:
            label = row.key.removesuffix("_gib").removeprefix("num_").replace("_", " ")
            lines.append(f"  {label:<23} {_shown(row):>10}  {row.why}".rstrip())
    if plan.remedies:
        lines += ["", "what would help, each by itself"]
        for remedy in plan.remedies:
            verdict = "fits" if remedy.fits else "does not fit"
            lines.append(f"  {remedy.change:<34} {_gib(remedy.peak_bytes):>10}  {verdict}")
    return "\n".join(lines[1:])


def _shown(row: Row) -> str:
    match row.value:
        case None:
            return "unknown"
        case bool():
            return "yes" if row.value else "no"
        case int() | float() if row.key.endswith("_gib"):
            return _gib(row.value * GIB)
        case int():
            return f"{row.value:,}"
        case float():
            return f"{row.value:,.1f}" if row.value >= 10 else f"{row.value:.3g}"
    return str(row.value)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def _size(line: Line) -> Row:
    return Row(f"{line.name}_gib", line.num_bytes / GIB, f"= {line.arithmetic}")


def _fits(num_bytes: int, limit_gib: float | None) -> bool | None:
    return None if limit_gib is None else num_bytes + RESERVE_BYTES <= limit_gib * GIB


def _fit_row(num_bytes: int, limit_gib: float | None) -> Row:
    if limit_gib is None:
        return Row("fits", None, "without --gpu-memory-gib")
    needed = f"{_gib(num_bytes)} + {_gib(RESERVE_BYTES)} reserve"
    return Row("fits", _fits(num_bytes, limit_gib), f"{needed} of {limit_gib:.1f} GiB")


def _run_rows(config: RunConfig, setup: Setup, ranks_why: str) -> list[Row]:
    shape, adapter = setup.shape, config.adapter
    trained = "all" if adapter is None else f"LoRA of rank {adapter.rank}"
    return [
        Row("model", config.model.path),
        Row("num_parameters", shape.num_parameters),
        Row("num_trained_parameters", shape.num_trained, trained),
        Row("num_ranks", setup.world_size, ranks_why),
        Row("zero_stage", setup.sharding.stage, f"train.deepspeed {config.train.deepspeed}"),
        Row("dtype", config.model.dtype, f"{setup.dtype_bytes} bytes"),
    ]


def _memory_rows(memory: Memory, limit_gib: float | None) -> Iterator[Row]:
    yield from map(_size, (*memory.states, *memory.micro_batch, *memory.update))
    phases = {
        "a micro-batch": total(memory.micro_batch),
        "the update": total(memory.update),
        "evaluation": total(memory.scoring),
    }
    if memory.scoring:
        parts = " + ".join(f"{_gib(line.num_bytes)} {line.name}" for line in memory.scoring)
        yield Row("evaluation_gib", phases["evaluation"] / GIB, f"= {parts.replace('_', ' ')}")
    most = max(phases, key=lambda name: phases[name])
    why = f"= {_gib(total(memory.states))} all the time + {_gib(phases[most])} in {most}"
    yield Row("peak_gib", memory.peak_bytes / GIB, why)
    yield _fit_row(memory.peak_bytes, limit_gib)


def _reference_rows(config: RunConfig, setup: Setup, limit_gib: float | None) -> list[Row]:
    """Memory in the reference pass, for each way that reference.sharding leaves open."""
    if config.reference.model is not None:
        setup = replace(setup, shape=_count(config, None, config.reference.model))
    setup = replace(setup, scoring_tokens=scoring_budget(config))
    asked = config.reference.sharding
    rows: list[Row] = []
    needed = 0
    for how, sharding in (("whole", "zero0"), ("zero3", "zero3")):
        if asked in ("auto", how):
            lines = estimate.reference_lines(setup, _sharding(sharding))
            needed = total(lines)
            parts = " + ".join(f"{_gib(line.num_bytes)} {line.name}" for line in lines)
            rows.append(Row(f"{how}_gib", needed / GIB, f"= {parts.replace('_', ' ')}"))
    return [*rows, _fit_row(needed, limit_gib)]
