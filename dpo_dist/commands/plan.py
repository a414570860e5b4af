"""What a run will need, before it runs: memory, steps, tokens, disk; no weights, no GPU.

1. Count the model and its adapter; read the DeepSpeed JSON, and the prepared pairs if any.
2. `make_plan` puts them through the arithmetic of dpo_dist.planning, a `Row` for every number.
3. `print_plan` prints the rows or their JSON; `print_dry_run` adds the resolved config and the
   commands. Nothing is written.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig, scoring_budget
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.data.batches import plan_micro_batches, step_pair_indices
from dpo_dist.errors import ConfigError
from dpo_dist.inputs.sizes import (
    Work,
    count_shape,
    disk_lines,
    make_setup,
    prepared_work,
    read_sizes,
)
from dpo_dist.model_files.of_run import start_adapter_dir
from dpo_dist.planning import estimate
from dpo_dist.planning.estimate import GIB, RESERVE_BYTES, Line, Memory, Setup, total
from dpo_dist.planning.plan_text import Plan, Row, as_dict, as_text, in_gib
from dpo_dist.planning.remedies import Remedy, remedies
from dpo_dist.run.local_ranks import LOOPBACK, count_gpus, count_workers
from dpo_dist.run.pipeline import stage_argv, stages_of
from dpo_dist.run.topology import Topology

STEPS_PACKED = 16  # optimizer steps whose micro-batches are counted
SHORTEST_MICRO_BATCH = 1024  # tokens a remedy goes down to while the pairs are unknown
NO_PAIRS = "known after `dpo-dist prepare`"


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
    for stage in stages_of(config):
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
    if ranks < 1:
        raise ConfigError(f"--world-size {ranks}", "1 or more ranks", "Correct it.")
    limit_gib = _gpu_memory_gib() if gpu_memory_gib is None else gpu_memory_gib
    setup = make_setup(config, ranks)
    work = prepared_work(config)
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


def _size(line: Line) -> Row:
    return Row(f"{line.name}_gib", line.num_bytes / GIB, f"= {line.arithmetic}")


def _fits(num_bytes: int, limit_gib: float | None) -> bool | None:
    return None if limit_gib is None else num_bytes + RESERVE_BYTES <= limit_gib * GIB


def _fit_row(num_bytes: int, limit_gib: float | None) -> Row:
    if limit_gib is None:
        return Row("fits", None, "without --gpu-memory-gib")
    needed = f"{in_gib(num_bytes)} + {in_gib(RESERVE_BYTES)} reserve"
    return Row("fits", _fits(num_bytes, limit_gib), f"{needed} of {limit_gib:.1f} GiB")


def _run_rows(config: RunConfig, setup: Setup, ranks_why: str) -> list[Row]:
    shape, adapter = setup.shape, config.adapter
    trained = "all" if adapter is None else f"LoRA of rank {adapter.rank}"
    if adapter is not None and adapter.rank_pattern:
        trained += "".join(f", {name} {rank}" for name, rank in adapter.rank_pattern.items())
    if start_adapter_dir(config) is not None and adapter is not None:
        trained = f"the adapter {adapter.path}"
    longer = config.model.add_tokens or config.model.pad_vocab_to_multiple
    return [
        Row("model", config.model.path),
        Row("num_parameters", shape.num_parameters),
        Row("num_trained_parameters", shape.num_trained, trained),
        *([Row("vocab_size", shape.vocab_size, "with model.add_tokens")] if longer else []),
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
        parts = " + ".join(f"{in_gib(line.num_bytes)} {line.name}" for line in memory.scoring)
        yield Row("evaluation_gib", phases["evaluation"] / GIB, f"= {parts.replace('_', ' ')}")
    most = max(phases, key=lambda name: phases[name])
    why = f"= {in_gib(total(memory.states))} all the time + {in_gib(phases[most])} in {most}"
    yield Row("peak_gib", memory.peak_bytes / GIB, why)
    yield _fit_row(memory.peak_bytes, limit_gib)


def _reference_rows(config: RunConfig, setup: Setup, limit_gib: float | None) -> list[Row]:
    """Memory in the reference pass, for each way that reference.sharding leaves open."""
    if config.objective.reference_free:
        losses = ", ".join(config.objective.names)
        return [
            Row("needed", False, f"objective.loss {losses} has no reference"),
            Row("fits", True),
        ]
    if config.reference.model is not None:
        setup = replace(setup, shape=count_shape(config, None, config.reference.model))
    setup = replace(setup, scoring_tokens=scoring_budget(config))
    asked = config.reference.sharding
    rows: list[Row] = []
    needed = 0
    for how, sharding in (("whole", "zero0"), ("zero3", "zero3")):
        if asked in ("auto", how):
            lines = estimate.reference_lines(setup, read_sizes(sharding))
            needed = total(lines)
            parts = " + ".join(f"{in_gib(line.num_bytes)} {line.name}" for line in lines)
            rows.append(Row(f"{how}_gib", needed / GIB, f"= {parts.replace('_', ' ')}"))
    return [*rows, _fit_row(needed, limit_gib)]


def _batch_rows(config: RunConfig, setup: Setup, work: Work | None) -> Iterator[Row]:
    pairs, tokens = config.train.global_batch_size, config.train.micro_batch_tokens
    yield Row("global_batch_pairs", pairs, "train.global_batch_size")
    why = f"= {pairs} pairs / {setup.world_size} ranks"
    yield Row("pairs_per_rank", pairs / setup.world_size, why)
    yield Row("micro_batch_tokens", tokens, "train.micro_batch_tokens")
    if work is None:
        yield Row("micro_batches_per_step", None, NO_PAIRS)
        return
    lengths = work.train.packed_lengths
    yield Row("mean_pair_tokens", float(lengths.mean()), "prompt + chosen + rejected")
    yield Row("longest_pair_tokens", int(lengths.max()))
    counts: list[int] = []
    for step in range(min(work.num_steps, STEPS_PACKED)):
        indices = step_pair_indices(step, len(lengths), pairs, config.run.seed)
        counts.append(len(plan_micro_batches(lengths, indices, setup.world_size, tokens)[0]))
    why = f"= {sum(counts)} micro-batches of a rank / the first {len(counts)} steps"
    yield Row("micro_batches_per_step", sum(counts) / len(counts), why)


def _work_rows(config: RunConfig, setup: Setup, work: Work | None) -> Iterator[Row]:
    forward, training = estimate.flops_per_token(setup.shape, setup.checkpointing)
    why = f"= 2 x {setup.shape.num_active:,} matrix elements"
    yield Row("forward_gflop_per_token", forward / 1e9, why)
    again = ", and a second forward" if setup.checkpointing else ""
    coupled = config.objective.second_forward
    if coupled is not None:
        training += forward
        again += f"; + {forward / 1e9:.3g} of a forward ahead of it, since {coupled}"
    yield Row("training_gflop_per_token", training / 1e9, f"forward and backward{again}")
    if work is None:
        for key in ("num_pairs", "num_steps", "num_tokens", "training_pflop", "reference_pflop"):
            yield Row(key, None, NO_PAIRS)
        return
    train, settings = work.train, config.train
    yield Row("num_pairs", len(train), f"and {len(work.held_out):,} held out")
    epochs = f"{len(train):,} pairs x {settings.num_epochs:g} epochs"
    capped = f", at most train.max_steps {settings.max_steps}" if settings.max_steps else ""
    why = f"= floor({epochs} / {settings.global_batch_size} pairs){capped}"
    yield Row("num_steps", work.num_steps, why)
    mean, in_steps = float(train.packed_lengths.mean()), work.num_steps * settings.global_batch_size
    num_tokens = round(mean * in_steps)
    yield Row("num_tokens", num_tokens, f"= {mean:,.1f} tokens of a pair x {in_steps:,} pairs")
    why = f"= {training / 1e9:.3g} GFLOP x {num_tokens:,} tokens"
    yield Row("training_pflop", num_tokens * training / 1e15, why)
    scored = int(train.packed_lengths.sum() + work.held_out.packed_lengths.sum())
    if config.objective.reference_free:
        yield Row("reference_pflop", 0.0, "no reference pass")
        return
    why = f"= {forward / 1e9:.3g} GFLOP x {scored:,} tokens of all pairs, each once"
    yield Row("reference_pflop", scored * forward / 1e15, why)


def _disk_rows(config: RunConfig, setup: Setup, work: Work | None) -> list[Row]:
    """What is written, as far as it is known, beside what is free; `fits` is the last row."""
    rows: list[Row] = []
    if work is None:
        rows = [Row("pairs_gib", None, NO_PAIRS), Row("reference_store_gib", None, NO_PAIRS)]
    lines = disk_lines(config, setup, work)
    needed = total(lines) / GIB
    root = config.run.dir.absolute()
    folder = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free / GIB
    rows += [*map(_size, lines), Row("total_gib", needed, "what is known")]
    return [*rows, Row("free_gib", free, f"in {folder}"), Row("fits", needed <= free)]


def _remedies(config: RunConfig, setup: Setup, work: Work | None, limit_gib: float) -> list[Remedy]:
    names = {"adamw": ("zero3", "zero3_offload"), "adafactor": ()}  # of the others zero3 alone
    quantized = None
    if config.adapter is not None and not config.adapter.use_dora:
        model = config.model.model_copy(update={"quantization": "nf4"})
        quantized = count_shape(config.model_copy(update={"model": model}), config.adapter)
    return remedies(
        setup,
        round(limit_gib * GIB),
        shardings={
            name: read_sizes(name) for name in names.get(config.train.optimizer, ("zero3",))
        },
        quantized=quantized,
        with_adapter=count_shape(config, AdapterSection.model_validate({}))
        if config.adapter is None
        else None,
        longest_pair=int(work.train.packed_lengths.max()) if work else SHORTEST_MICRO_BATCH,
    )


def _gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU of this machine, None without one."""
    if not count_gpus() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(mib) / 1024 for mib in listed if mib.isdigit()]
    return min(sizes, default=None)
