"""What a run will need, before it runs: memory, steps, tokens, disk; no weights, no GPU.

1. `count_model` builds the model and its adapter without memory and counts what they hold.
2. `make_plan` puts that, the DeepSpeed JSON and the prepared pairs, if there are any, through the
   arithmetic of dpo_dist.estimate.
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

import numpy as np
import torch

from dpo_dist import estimate
from dpo_dist.config import AdapterSection, RunConfig, to_yaml
from dpo_dist.data.batches import (
    check_token_budget,
    num_steps,
    plan_micro_batches,
    step_pair_indices,
)
from dpo_dist.data.pairs import SPLITS, Pairs, open_pairs
from dpo_dist.engine.adapters import add_adapter
from dpo_dist.engine.ds_config import read_sharding
from dpo_dist.engine.model_parts import base_of, output_module
from dpo_dist.errors import ModelFilesError
from dpo_dist.estimate import GIB, RESERVE_BYTES, Line, Memory, ModelShape, Remedy, Setup, total
from dpo_dist.local import LOOPBACK, count_gpus, count_workers
from dpo_dist.model_files import read_model_config, resolve_model_dir
from dpo_dist.objective.logprobs import LOGITS_BUDGET
from dpo_dist.plan import STAGES, scoring_budget, stage_argv, store_root
from dpo_dist.reference_parts import ROW_DTYPE
from dpo_dist.run_dir import RunDir
from dpo_dist.topology import Topology

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
STEPS_PACKED = 16  # optimizer steps whose micro-batches are counted
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
    disk_fits: bool | None
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
            print(f"    and {ranks - 1} more, RANK and LOCAL_RANK up to {ranks - 1}")
    print("  PORT is one that is free when the stage starts")


def make_plan(config: RunConfig, world_size: int | None, gpu_memory_gib: float | None) -> Plan:
    """The plan of a run; arguments and errors as those of `print_plan`."""
    ranks, ranks_why = count_workers(config.local)
    if world_size is not None:
        ranks, ranks_why = world_size, "--world-size"
    limit_gib = _gpu_memory_gib() if gpu_memory_gib is None else gpu_memory_gib
    setup = make_setup(config, count_model(config, config.adapter), ranks)
    work = _prepared_work(config)
    memory = estimate.estimate(setup)
    reference = _reference_memory(config, setup)
    fits = _fits(memory.peak_bytes, limit_gib)
    reference_fits = _fits(min(reference.values()), limit_gib)
    disk_fits, disk = _disk(config, setup, work)
    sections = {
        "run": _run_rows(config, setup, ranks_why),
        "memory of a GPU": [*_memory_rows(memory), _fit_row(memory.peak_bytes, limit_gib)],
        "memory of a host": [_size(line) for line in memory.host],
        "reference pass": [
            *(Row(f"{how}_gib", size / GIB) for how, size in reference.items()),
            _fit_row(min(reference.values()), limit_gib),
        ],
        "batches": list(_batch_rows(config, setup, work)),
        "work": list(_work_rows(config, setup, work)),
        "disk": disk,
    }
    remedies: list[Remedy] = []
    if fits is False and limit_gib is not None:
        remedies += _remedies(config, setup, work, limit_gib)
    if reference_fits is False and config.reference.sharding == "whole":
        sharded = _reference_memory(config, setup, "zero3")["zero3"]
        remedies.append(
            Remedy("reference.sharding=auto", sharded, _fits(sharded, limit_gib) is True)
        )
    both = False if reference_fits is False else fits
    return Plan({k: rows for k, rows in sections.items() if rows}, both, disk_fits, remedies)


def count_model(config: RunConfig, adapter: AdapterSection | None) -> ModelShape:
    """Counts a model that is built on torch's meta device, where tensors have no memory.

    Raises ModelFilesError when there is no such model or transformers cannot build it, and
    ConfigError when the adapter does not suit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_dir, trust = _config_dir(config), config.model.trust_remote_code
    read_model_config(model_dir)
    try:
        described = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust)
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(described, trust_remote_code=trust)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        raise ModelFilesError(
            f"{model_dir} describes no model that transformers can build "
            f"({' '.join(str(error).split())[:200]})",
            "the config.json of a causal language model",
            "Check model.path, or upgrade transformers.",
        ) from None
    if adapter is not None:
        with torch.device("meta"):
            policy = add_adapter(policy, adapter, str(model_dir))
    return shape_of(policy)


def shape_of(policy: Any) -> ModelShape:
    """The numbers of a causal LM, with or without an adapter, whatever its device."""
    text = base_of(policy).config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = getattr(text, "num_attention_heads", None) or 1
    head_size = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", None) or 0
    of_experts = getattr(text, "moe_intermediate_size", None) if experts else None
    mlp = of_experts or getattr(text, "intermediate_size", None) or 4 * hidden
    named = dict(policy.named_parameters())
    inputs = [weight.shape for name, weight in named.items() if ".lora_A." in name]
    norms = [
        module
        for module in policy.modules()
        if "Norm" in type(module).__name__ and tuple(module.weight.shape) == (hidden,)
    ]
    head = output_module(policy).weight
    return ModelShape(
        num_parameters=sum(p.numel() for p in named.values()),
        num_trained=sum(p.numel() for p in named.values() if p.requires_grad),
        num_active=_num_active(policy, text, experts),
        num_layers=layers,
        hidden_size=hidden,
        query_width=heads * head_size,
        key_value_width=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        mlp_width=mlp * max(experts, 1),
        mlp_matrices=3 if any("gate_" in name for name in named) else 2,
        experts_per_token=experts,
        norms_per_layer=len(norms) // layers,
        vocab_size=head.shape[0],
        head_trained=head.requires_grad,
        adapter_ranks=sum(shape[0] for shape in inputs) // layers,
        adapter_inputs=sum(shape[1] for shape in inputs) // layers,
    )


def _num_active(policy: Any, text: Any, experts: int) -> int:
    """Elements of the matrices that a token is multiplied with.

    An embedding is looked up, not multiplied, unless it is the head too; of the experts a token
    passes through its own only.
    """
    counts = (getattr(text, f"{name}_experts", None) for name in ("num_local", "num", "n_routed"))
    share = experts / next(filter(None, counts), 1) if experts else 1
    embedding, head = base_of(policy).get_input_embeddings().weight, output_module(policy).weight
    active = 0
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1 and (parameter is not embedding or embedding is head):
            active += round(parameter.numel() * (share if ".experts." in name else 1))
    return active


def make_setup(config: RunConfig, shape: ModelShape, world_size: int) -> Setup:
    """What the memory of a rank of this run depends on."""
    return Setup(
        shape=shape,
        sharding=estimate.sharding_of(read_sharding(config.train.deepspeed)),
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
    values = {names[t]: {r.key: r.value for r in rows} for t, rows in plan.sections.items()}
    arithmetic = {
        f"{names[t]}.{row.key}": row.why for t, rows in plan.sections.items() for row in rows
    }
    remedies = [
        {"change": r.change, "peak_gib": r.peak_bytes / GIB, "fits": r.fits} for r in plan.remedies
    ]
    verdict = {"fits": plan.fits, "disk_fits": plan.disk_fits, "remedies": remedies}
    return verdict | values | {"arithmetic": {key: why for key, why in arithmetic.items() if why}}


def as_text(plan: Plan) -> str:
    """The plan for a terminal: a line a row, value and arithmetic."""
    lines: list[str] = []
    for title, rows in plan.sections.items():
        lines += ["", title]
        for row in rows:
            label = row.key.removesuffix("_gib").removeprefix("num_").replace("_", " ")
            value = _shown(row)
            joint = " = " if row.why[:1].isdigit() and value != "unknown" else "  "
            lines.append(f"  {label:<22} {value:>10}{joint if row.why else ''}{row.why}".rstrip())
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
            return _gib(round(row.value * GIB))
        case int():
            return f"{row.value:,}"
        case float():
            return f"{row.value:,.1f}" if abs(row.value) >= 1 else f"{row.value:.3g}"
    return str(row.value)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def _size(line: Line) -> Row:
    return Row(f"{line.name}_gib", line.num_bytes / GIB, line.arithmetic)


def _fits(num_bytes: int, limit_gib: float | None) -> bool | None:
    return None if limit_gib is None else num_bytes + RESERVE_BYTES <= limit_gib * GIB


def _fit_row(num_bytes: int, limit_gib: float | None) -> Row:
    if limit_gib is None:
        return Row("fits", None, "without --gpu-memory-gib")
    sizes = f"{_gib(num_bytes)} + {_gib(RESERVE_BYTES)} reserve of {limit_gib:g} GiB"
    return Row("fits", _fits(num_bytes, limit_gib), sizes)


def _run_rows(config: RunConfig, setup: Setup, ranks_why: str) -> list[Row]:
    shape, adapter = setup.shape, config.adapter
    trained = "all of them" if adapter is None else f"LoRA of rank {adapter.rank}"
    return [
        Row("model", config.model.path),
        Row("num_parameters", shape.num_parameters),
        Row("num_trained_parameters", shape.num_trained, trained),
        Row("num_ranks", setup.world_size, ranks_why),
        Row("zero_stage", setup.sharding.stage, f"train.deepspeed {config.train.deepspeed}"),
        Row("dtype", config.model.dtype, f"{setup.dtype_bytes} bytes"),
    ]


def _memory_rows(memory: Memory) -> Iterator[Row]:
    yield from map(_size, (*memory.states, *memory.micro_batch, *memory.update))
    parts = {
        "a micro-batch": total(memory.micro_batch),
        "the update": total(memory.update),
        "evaluation": total(memory.scoring),
    }
    most = max(parts, key=lambda name: parts[name])
    why = f"{_gib(total(memory.states))} always + {_gib(parts[most])} in {most}"
    yield Row("evaluation_gib", parts["evaluation"] / GIB, "in place of a micro-batch")
    yield Row("peak_gib", memory.peak_bytes / GIB, why)


def _reference_rows(config: RunConfig, setup: Setup, limit_gib: float | None) -> list[Row]:
    """Memory of a rank in the reference pass, for each way that reference.sharding leaves open."""
    if config.reference.model is not None:
        setup = replace(setup, shape=count_model(config, None, config.reference.model))
    rows: list[Row] = []
    for sharding in ("whole", "zero3"):
        if config.reference.sharding in ("auto", sharding):
            parameters, forward = estimate.reference_bytes(
                setup, _sharding("zero3") if sharding == "zero3" else None
            )
            why = f"{_gib(parameters)} parameters + {_gib(forward)} in a forward"
            rows.append(Row(f"{sharding}_gib", (parameters + forward) / GIB, why))
            fit_row = _fit_row(parameters + forward, limit_gib)
    return [*rows, fit_row]


def _batch_rows(config: RunConfig, setup: Setup, work: Work | None) -> Iterator[Row]:
    pairs, tokens = config.train.global_batch_size, config.train.micro_batch_tokens
    yield Row("global_batch_pairs", pairs, "train.global_batch_size")
    each = f"{pairs} pairs / {setup.world_size} ranks"
    yield Row("pairs_per_rank", pairs / setup.world_size, each)
    yield Row("micro_batch_tokens", tokens, "train.micro_batch_tokens")
    if work is None:
        yield Row("micro_batches_per_step", None, NO_PAIRS)
        return
    lengths = work.train.packed_lengths
    yield Row("mean_pair_tokens", float(lengths.mean()), "prompt + chosen + rejected")
    yield Row("longest_pair_tokens", int(lengths.max()))
    counts = []
    for step in range(min(work.num_steps, STEPS_PACKED)):
        indices = step_pair_indices(step, len(lengths), pairs, config.run.seed)
        counts.append(len(plan_micro_batches(lengths, indices, setup.world_size, tokens)[0]))
    why = f"{sum(counts)} of a rank / the first {len(counts)} steps"
    yield Row("micro_batches_per_step", sum(counts) / len(counts), why)


def _work_rows(config: RunConfig, setup: Setup, work: Work | None) -> Iterator[Row]:
    forward, training = estimate.flops_per_token(setup.shape, setup.checkpointing)
    yield Row("forward_gflop_per_token", forward / 1e9, f"2 x {setup.shape.num_active:,} elements")
    recomputed = " and a second forward" if setup.checkpointing else ""
    yield Row("training_gflop_per_token", training / 1e9, f"forward, backward{recomputed}")
    if work is None:
        for key in ("num_pairs", "num_steps", "num_tokens", "training_pflop", "reference_pflop"):
            yield Row(key, None, NO_PAIRS)
        return
    train, settings = work.train, config.train
    yield Row("num_pairs", len(train), f"and {len(work.held_out):,} held out")
    why = f"floor({len(train):,} pairs x {settings.num_epochs:g} epochs"
    why = f"{why} / {settings.global_batch_size} pairs)"
    capped = f", at most train.max_steps {settings.max_steps}" if settings.max_steps else ""
    yield Row("num_steps", work.num_steps, why + capped)
    mean, in_steps = float(train.packed_lengths.mean()), work.num_steps * settings.global_batch_size
    trained = round(mean * in_steps)
    yield Row("num_tokens", trained, f"{mean:,.1f} tokens x {in_steps:,} pairs")
    yield Row("training_pflop", trained * training / 1e15, f"{training / 1e9:.3g} GFLOP x tokens")
    scored = int(train.packed_lengths.sum() + work.held_out.packed_lengths.sum())
    yield Row("reference_pflop", scored * forward / 1e15, f"{scored:,} tokens of all pairs, once")


def _disk(config: RunConfig, setup: Setup, work: Work | None) -> tuple[bool | None, list[Row]]:
    """(whether what is known fits, rows) of the files under run.dir."""
    paths, shape = RunDir(config.run.dir), setup.shape
    rows: list[Row] = []
    if work is None:
        rows += [Row("pairs_gib", None, NO_PAIRS), Row("reference_store_gib", None, NO_PAIRS)]
    else:
        size = sum(p.stat().st_size for p in paths.pairs_dir.rglob("*") if p.is_file())
        rows.append(Row("pairs_gib", size / GIB, "as they are"))
        count = len(work.train) + len(work.held_out)
        why = f"{ROW_DTYPE.itemsize} bytes x {count:,} pairs in {store_root(config)}"
        rows.append(Row("reference_store_gib", ROW_DTYPE.itemsize * count / GIB, why))
    rows += map(_size, estimate.checkpoint_lines(setup, config.checkpoint.keep))
    adapter = config.adapter is not None
    rows += map(
        _size, estimate.export_lines(shape, DTYPE_BYTES[config.export.dtype], adapter, config.export.merge)
    )
    needed = sum(row.value for row in rows if isinstance(row.value, float))
    existing = next(p for p in (paths.root.absolute(), *paths.root.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / GIB
    rows += [Row("total_gib", needed), Row("free_gib", free, f"at {existing}")]
    return needed <= free, [*rows, Row("fits", needed <= free)]


def _remedies(
    config: RunConfig, setup: Setup, work: Work | None, limit_gib: float
) -> list[Remedy]:
    return estimate.remedies(
        setup,
        round(limit_gib * GIB),
        shardings={name: _sharding(name) for name in ("zero3", "zero3_offload")},
        with_adapter=count_model(config, AdapterSection()) if config.adapter is None else None,
        longest_pair=int(work.train.packed_lengths.max()) if work else 1024,
    )
