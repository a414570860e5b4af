"""Batches, steps, the optimizer and sharding, under transformers' names."""

import json
import re
from pathlib import Path
from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.importing.schedule import convert_schedule
from dpo_dist.importing.settings import Run

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
ENDLESS_EPOCHS = 1000  # the data are repeated until max_steps are done


def convert_train(run: Run, rest_decays: float | None = None) -> None:
    """The section train, but for what only one trainer has; `rest_decays` as in its schedule."""
    settings = run.settings
    put_weight_decay(run)
    _batch(run)
    _steps(run)
    convert_schedule(run, rest_decays)
    optimizer = settings.get("optim")
    if optimizer not in OPTIMIZERS:
        run.differs.append(f"{settings.name('optim')}: {optimizer}; train.optimizer is adamw")
    elif settings.given("optim"):
        run.put("train.optimizer", OPTIMIZERS[optimizer], settings.why("optim"))
    _sharding(run)
    if run.value("train.optimizer") == "adafactor":
        _check_adafactor(run)


def put_weight_decay(run: Run) -> None:
    """Told where it is there at all."""
    settings = run.settings
    if (settings.get("weight_decay") or 0) > 0:
        note = f"{settings.peer.name} leaves biases and norms out, dpo-dist does not"
        why = settings.why("weight_decay", note)
        run.put("train.weight_decay", settings.get("weight_decay"), why)


def recompute(run: Run, asked: bool, why: str, router_coef: float | None) -> None:
    """train.gradient_checkpointing, off where routers must be trained."""
    ours = "train.gradient_checkpointing"
    if asked and router_coef:
        run.put(ours, False, f"not {run.settings.peer.name}'s: the routers of a recomputed layer "
                "pass no gradient on; it costs memory")  # fmt: skip
    else:
        run.put(ours, asked, why)


def _check_adafactor(run: Run) -> None:
    """What `train` would refuse, told now."""
    sharding, dtype = run.value("train.deepspeed"), run.value("model.dtype")
    if (sharding, dtype) != ("zero0", "float32"):
        run.differs.append(
            f"{run.settings.name('optim')}: adafactor; train refuses it with train.deepspeed "
            f"{sharding} and model.dtype {dtype}: set zero0 and float32, or train.optimizer "
            "adamw_8bit to save memory"
        )


def _batch(run: Run) -> None:
    settings, processes = run.settings, run.num_processes
    device, accumulating = (
        settings.name(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    each = settings.get("per_device_train_batch_size")
    accumulated = settings.get("gradient_accumulation_steps")
    if processes is None:
        raise ConfigError(
            f"the number of processes is not in {settings.peer.name}'s YAML",
            f"it, because {device} x {accumulating} x num_processes = train.global_batch_size",
            f"Add --num-processes N, the GPUs of the {settings.peer.name} run, or "
            "--accelerate-config FILE.",
        )
    total = each * accumulated * processes
    run.arithmetic = (
        f"{device} {each} x {accumulating} {accumulated} x num_processes {processes} = "
        f"train.global_batch_size {total}"
    )
    why = f"{each} a device x {accumulated} accumulated x {processes} processes"
    run.put("train.global_batch_size", total, why)
    longest = run.values.get("data.max_length")
    if longest:
        tokens = each * 2 * longest[0]
        why = (
            f"{each} a device x 2 answers x {longest[0]} tokens, {settings.peer.name}'s own batch "
            "at its largest"
        )
        run.put("train.micro_batch_tokens", tokens, why)


def _steps(run: Run) -> None:
    settings = run.settings
    epochs, limit = settings.get("num_train_epochs"), settings.get("max_steps") or 0
    if limit > 0:
        run.put("train.max_steps", limit, settings.why("max_steps"))
        why = f"{settings.peer.name} repeats the data until max_steps are done"
        run.put("train.num_epochs", float(ENDLESS_EPOCHS), why)
    else:
        run.put("train.num_epochs", epochs, settings.why("num_train_epochs"))


def _sharding(run: Run) -> None:
    given = run.settings.get("deepspeed")
    launched = run.accelerate.get("deepspeed_config") or {}
    if isinstance(given, dict):
        found = cast("dict[str, Any]", given)
        _put_sharding(run, found.get("zero_optimization") or {"stage": 0}, "deepspeed")
    elif given is not None or launched.get("deepspeed_config_file"):
        _read_sharding(run, Path(given or launched["deepspeed_config_file"]))
    elif launched:
        device = launched.get("offload_optimizer_device", "none")
        zero = {"stage": launched.get("zero_stage", 2), "offload_optimizer": {"device": device}}
        _put_sharding(run, zero, "deepspeed_config of the accelerate config")


def _read_sharding(run: Run, path: Path) -> None:
    try:
        zero = json.loads(path.read_text()).get("zero_optimization") or {"stage": 0}
    except (OSError, ValueError):
        named = re.search(r"z(?:ero)?_?([0-3])", path.stem)
        if named is None:
            run.differs.append(
                f"deepspeed: {path} cannot be read from here; train.deepspeed is zero3, see "
                "ds_configs/README.md for the others"
            )
            return
        offload = "cpu" if "offload" in path.stem else "none"
        zero = {"stage": named.group(1), "offload_optimizer": {"device": offload}}
        _put_sharding(run, zero, f"deepspeed: {path.name} by its name, as it is not here")
        return
    _put_sharding(run, zero, "deepspeed")


def _put_sharding(run: Run, zero: dict[str, Any], source: str) -> None:
    stage = int(zero.get("stage", 0))
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloaded and stage != 3:
        run.differs.append("deepspeed: its offload_optimizer; zero3_offload is the one with it")
    name = "zero3_offload" if offloaded and stage == 3 else f"zero{stage}"
    why = f"{source}: stage {stage}" + (", optimizer offloaded" * offloaded)
    run.put("train.deepspeed", name, why)
