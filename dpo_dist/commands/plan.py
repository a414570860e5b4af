"""What a run will need, before it runs: memory, steps, tokens, disk; no weights, no GPU.

1. Read: count the model and its adapter; open the DeepSpeed JSON, and the prepared pairs if any.
2. `make_plan`: put them through the arithmetic of `dpo_dist.planning`, an entry for every number.
3. `print_plan` prints the plan as text or JSON; `print_dry_run` adds the resolved config and the
   commands. Nothing is written.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.data.batches import plan_micro_batches, step_pair_indices
from dpo_dist.errors import ConfigError
from dpo_dist.inputs.disk import disk_sizes
from dpo_dist.inputs.setup import (
    count_shape,
    make_setup,
    sharding_named,
    shares_prompts,
    without_quantization,
)
from dpo_dist.inputs.work import Work, computed_by_order, prepared_work, tokens_of
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.planning import entries
from dpo_dist.planning.memory import estimate_memory, fits, longest_pair, reference_sizes
from dpo_dist.planning.remedies import Alternatives, find_remedies
from dpo_dist.planning.run_plan import Entry, RunPlan, as_dict, as_text
from dpo_dist.planning.setup import PairCounts, Setup
from dpo_dist.planning.sizes import GIB, Size
from dpo_dist.run.local_ranks import LOOPBACK, count_gpus, count_workers
from dpo_dist.run.pipeline import stage_argv, stages_of
from dpo_dist.run.topology import Topology, count_places

LEAST_MICRO_BATCH = 1024  # tokens a remedy goes down to while the pairs are unknown


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
    checked = Path(config.model.path).expanduser().is_dir()
    if checked:
        from dpo_dist.exporting.preflight import preflight_here  # seconds of imports

        preflight_here(config)
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
    if not checked:
        print(f"  not tried yet: whether {config.model.path}, not on this machine, can be exported")


def make_plan(config: RunConfig, world_size: int | None, gpu_memory_gib: float | None) -> RunPlan:
    """The plan of a run; arguments and errors as those of `print_plan`."""
    ranks, ranks_why = _ranks(config, world_size)
    places = count_places(ranks, config.train.sequence_parallel)
    limit_gib = _gpu_memory_gib() if gpu_memory_gib is None else gpu_memory_gib
    setup, work = make_setup(config, ranks), prepared_work(config)
    counts = None if work is None else _count_pairs(config, work, places)
    memory = estimate_memory(setup)
    fits_gpu = None if limit_gib is None else fits(memory.peak_bytes, limit_gib * GIB)
    longest = None if limit_gib is None else longest_pair(setup, limit_gib * GIB)
    changes = []
    if limit_gib is not None and not fits_gpu:
        alternatives = _alternatives(config, counts)
        changes = find_remedies(setup, round(limit_gib * GIB), alternatives)
    reference = entries.reference_entries(config, _reference_passes(config, setup), limit_gib)
    of_export = entries.export_entries(_export_passes(config, setup), limit_gib)
    disk = _disk_entries(config, setup, work)
    groups = {
        "run": entries.run_entries(config, setup, ranks_why, RunModels(config).start_adapter),
        "memory_per_gpu": list(entries.memory_entries(memory, limit_gib, longest)),
        "memory_per_host": entries.host_entries(memory),
        "reference_pass": reference,
        "evaluate_and_verify": of_export,
        "batches": list(entries.batch_entries(config, setup, counts)),
        "work": list(entries.work_entries(config, setup, counts)),
        "disk": disk,
    }
    return RunPlan(
        groups={name: group for name, group in groups.items() if group},
        fits=False if False in (reference[-1].value, of_export[-1].value) else fits_gpu,
        disk_fits=disk[-1].value is True,
        remedies=changes,
    )


def _ranks(config: RunConfig, world_size: int | None) -> tuple[int, str]:
    """The ranks of training, and where their number comes from."""
    if world_size is None:
        return count_workers(config.local)
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}", "1 or more ranks", "Correct it.")
    return world_size, "--world-size"


def _count_pairs(config: RunConfig, work: Work, places: int) -> PairCounts:
    """The prepared pairs in numbers, the micro-batches of the first steps among them."""
    train, settings = work.train, config.train
    lengths, size, seed = train.packed_lengths, settings.global_batch_size, config.run.seed
    shares = shares_prompts(config)
    shared = train.shared if shares else None
    micro_batches: list[int] = []
    for step in work.first_steps:
        together = train.together(config.data.order)
        indices = step_pair_indices(step, len(lengths), size, seed, together)
        tokens = settings.micro_batch_tokens
        on_ranks = plan_micro_batches(lengths, indices, places, tokens, shared)
        micro_batches.append(len(on_ranks[0]))
    return PairCounts(
        num_pairs=len(work.train),
        num_held_out=len(work.held_out),
        num_steps=work.num_steps,
        mean_tokens=float(lengths.mean()),
        longest_tokens=int(lengths.max()),
        reference_tokens=sum(
            tokens_of(split, range(len(split)), shares)[0] for split in (train, work.held_out)
        ),
        micro_batches=tuple(micro_batches),
        computed=computed_by_order(config, work),
    )


def _reference_passes(config: RunConfig, setup: Setup) -> dict[str, tuple[Size, ...]]:
    """Memory of a GPU in the reference pass, for each way that reference.sharding leaves open."""
    if config.objective.reference_free:
        return {}
    if config.reference.model is not None:
        setup = replace(setup, shape=count_shape(config, None, config.reference.model))
    return _scoring_passes(config, setup)


def _export_passes(config: RunConfig, setup: Setup) -> dict[str, tuple[Size, ...]]:
    """The same of evaluate and verify, whose largest model is unquantized where one is merged."""
    if config.model.quantization is not None and config.export.merge:
        setup = replace(setup, shape=count_shape(without_quantization(config), None))
    return _scoring_passes(config, setup)


def _scoring_passes(config: RunConfig, setup: Setup) -> dict[str, tuple[Size, ...]]:
    setup = replace(setup, scoring_tokens=config.scoring_tokens)
    asked = config.reference.sharding
    return {
        how: reference_sizes(setup, sharding_named(name))
        for how, name in (("whole", "zero0"), ("zero3", "zero3"))
        if asked in ("auto", how)
    }


def _disk_entries(config: RunConfig, setup: Setup, work: Work | None) -> list[Entry]:
    root = config.run.dir.absolute()
    folder = next(folder for folder in (root, *root.parents) if folder.is_dir())
    return entries.disk_entries(
        disk_sizes(config, setup, work),
        pairs_known=work is not None,
        free_bytes=shutil.disk_usage(folder).free,
        folder=folder,
    )


def _alternatives(config: RunConfig, counts: PairCounts | None) -> Alternatives:
    """What this run could use instead: other shardings, LoRA, a quantized base."""
    quantized = with_adapter = None
    if config.adapter is None:
        with_adapter = count_shape(config, AdapterSection.model_validate({}))
    elif not config.adapter.use_dora:
        model = config.model.model_copy(update={"quantization": "nf4"})
        quantized = count_shape(config.model_copy(update={"model": model}), config.adapter)
    # of the optimizers AdamW alone is offloaded, and Adafactor is not sharded
    names = {"adamw": ("zero3", "zero3_offload"), "adafactor": ()}
    return Alternatives(
        shardings={
            name: sharding_named(name) for name in names.get(config.train.optimizer, ("zero3",))
        },
        with_adapter=with_adapter,
        quantized=quantized,
        least_tokens=LEAST_MICRO_BATCH if counts is None else counts.longest_tokens,
    )


def _gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU of this machine, None without one."""
    if not count_gpus() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(mib) / 1024 for mib in listed if mib.isdigit()]
    return min(sizes, default=None)
