"""The keys of TRL about batches, steps, the optimizer and sharding."""

import json
import math
from pathlib import Path
from typing import Any

from dpo_dist.errors import ConfigError
from dpo_dist.trl_import.settings import OUR_DEFAULTS, Run

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
ENDLESS_EPOCHS = 1000  # TRL repeats the data until max_steps are done


def convert_train(run: Run) -> None:
    """The section train."""
    settings = run.settings
    _batch(run)
    _steps(run)
    optimizer = settings.get("optim")
    if optimizer not in OPTIMIZERS:
        run.differs.append(f"optim: {optimizer}; train.optimizer is adamw")
    elif settings.given("optim"):
        run.put("train.optimizer", OPTIMIZERS[optimizer], settings.why("optim"))
    _recompute(run)
    _sharding(run)
    if run.values.get("train.optimizer", ("", ""))[0] == "adafactor":
        _check_adafactor(run)


def _recompute(run: Run) -> None:
    settings, ours = run.settings, "train.gradient_checkpointing"
    recompute, source = settings.get("gradient_checkpointing"), "gradient_checkpointing"
    if settings.given("activation_checkpointing"):
        recompute, source = settings.get("activation_checkpointing"), "activation_checkpointing"
    if recompute and settings.get("router_aux_loss_coef"):
        why = "not TRL's: the routers of a recomputed layer pass no gradient on; it costs memory"
        run.put(ours, False, why)
    else:
        run.put(ours, bool(recompute), settings.why(source))


def _check_adafactor(run: Run) -> None:
    """What `train` would refuse, told now."""
    sharding, dtype = (
        run.values.get(key, (OUR_DEFAULTS[key], ""))[0]
        for key in ("train.deepspeed", "model.dtype")
    )
    if (sharding, dtype) != ("zero0", "float32"):
        run.differs.append(
            f"optim: adafactor; train refuses it with train.deepspeed {sharding} and model.dtype "
            f"{dtype}: set zero0 and float32, or train.optimizer adamw_8bit to save memory"
        )


def _batch(run: Run) -> None:
    settings, processes = run.settings, run.num_processes
    each = settings.get("per_device_train_batch_size")
    accumulated = settings.get("gradient_accumulation_steps")
    if processes is None:
        raise ConfigError(
            "the number of processes is not in TRL's YAML",
            "it, because per_device_train_batch_size x gradient_accumulation_steps x "
            "num_processes = train.global_batch_size",
            "Add --num-processes N, the GPUs of the TRL run, or --accelerate-config FILE.",
        )
    total = each * accumulated * processes
    run.arithmetic = (
        f"per_device_train_batch_size {each} x gradient_accumulation_steps {accumulated} x "
        f"num_processes {processes} = train.global_batch_size {total}"
    )
    why = f"{each} a device x {accumulated} accumulated x {processes} processes"
    run.put("train.global_batch_size", total, why)
    longest = run.values.get("data.max_length")
    if longest:
        tokens = each * 2 * longest[0]
        why = f"{each} a device x 2 answers x {longest[0]} tokens, TRL's own batch at its largest"
        run.put("train.micro_batch_tokens", tokens, why)


def _steps(run: Run) -> None:
    settings = run.settings
    epochs, limit = settings.get("num_train_epochs"), settings.get("max_steps")
    if limit > 0:
        run.put("train.max_steps", limit, settings.why("max_steps"))
        why = "TRL repeats the data until max_steps are done"
        run.put("train.num_epochs", float(ENDLESS_EPOCHS), why)
    else:
        run.put("train.num_epochs", epochs, settings.why("num_train_epochs"))
    schedule = settings.get("lr_scheduler_type")
    if schedule not in SCHEDULES:
        run.differs.append(
            f"lr_scheduler_type: {schedule}; train.lr_schedule is linear, one of "
            f"{', '.join(dict.fromkeys(SCHEDULES.values()))}"
        )
    shape = SCHEDULES.get(schedule, "linear")
    run.put("train.lr_schedule", shape, settings.why("lr_scheduler_type"))
    warmup = settings.get("warmup_steps")
    key = "train.warmup_ratio"
    if schedule == "constant":
        run.put(key, 0.0, "lr_scheduler_type constant does not warm up")
    elif settings.given("warmup_ratio"):
        run.put(key, float(settings.get("warmup_ratio")), "warmup_ratio of earlier versions")
    elif warmup < 1:
        run.put(key, float(warmup), settings.why("warmup_steps"))
    elif limit > 0:
        run.put(key, _ratio(warmup, limit), f"warmup_steps {warmup} / max_steps {limit}")
    else:
        run.put(key, 0.1, "not TRL's, see below")
        run.differs.append(
            f"warmup_steps: {warmup}; set train.warmup_ratio to {warmup} / the steps that "
            "`dpo-dist plan` shows once the pairs are prepared"
        )


def _ratio(warmup: int, steps: int) -> float:
    """The largest ratio of which training makes `warmup` steps: it rounds up, and 7 / 25 x 25 is
    7.000000000000001."""
    ratio = warmup / steps
    return math.nextafter(ratio, 0.0) if math.ceil(steps * ratio) > warmup else ratio


def put_every(run: Run, ours: str, strategy_key: str, *names: str) -> None:
    """Steps between two checkpoints, evaluations or lines, where TRL counts steps too."""
    settings = run.settings
    strategy = settings.get(strategy_key)
    if not any(settings.given(name) for name in (strategy_key, *names)):
        return  # how often is no matter of the numbers
    key = next((name for name in names if settings.given(name)), names[-1])
    steps, limit = settings.get(key), settings.get("max_steps")
    if strategy != "steps":
        run.differs.append(f"{strategy_key}: {strategy}; {ours} counts steps")
    elif steps >= 1:
        run.put(ours, round(steps), settings.why(key))
    elif limit > 0:
        run.put(ours, max(1, math.ceil(steps * limit)), f"{key} {steps} x max_steps {limit}")
    else:
        run.differs.append(f"{key}: {steps}; {ours} counts steps, not shares of the run")


def _sharding(run: Run) -> None:
    settings, ours = run.settings, "train.deepspeed"
    given = settings.get("deepspeed")
    launched = run.accelerate.get("deepspeed_config") or {}
    zero: dict[str, Any] | None = None
    source = "deepspeed"
    if isinstance(given, dict):
        zero = given.get("zero_optimization") or {"stage": 0}
    elif given is not None or launched.get("deepspeed_config_file"):
        path = Path(given or launched["deepspeed_config_file"])
        try:
            zero = json.loads(path.read_text()).get("zero_optimization") or {"stage": 0}
        except (OSError, ValueError):
            run.differs.append(
                f"deepspeed: {path} cannot be read from here; train.deepspeed is zero3, see "
                "ds_configs/README.md for the others"
            )
    elif launched:
        source = "deepspeed_config of the accelerate config"
        device = launched.get("offload_optimizer_device", "none")
        zero = {
            "stage": launched.get("zero_stage", 2),
            "offload_optimizer": {"device": device},
        }
    if zero is None:
        return
    stage = int(zero.get("stage", 0))
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloaded and stage != 3:
        run.differs.append("deepspeed: its offload_optimizer; zero3_offload is the one with it")
    name = "zero3_offload" if offloaded and stage == 3 else f"zero{stage}"
    run.put(ours, name, f"{source}: stage {stage}" + (", optimizer offloaded" * offloaded))
