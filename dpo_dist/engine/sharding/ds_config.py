"""The DeepSpeed config: a JSON says how to shard, the run config owns every number.

Imports neither torch nor deepspeed, so that the planner can read it on a login node.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_dist.config.training_section import TrainSection
from dpo_dist.errors import ConfigError
from dpo_dist.parsing import parse_json

# Who owns a number: setting it twice would let one of the two be silently ignored.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and the other AdamW keys",
    "scheduler": "train.lr_schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "train.gradient_checkpointing",
    "checkpoint": "checkpoint",
}


# What DeepSpeed would split over ranks beside ZeRO: tried, and it does not hold here.
SPLITS_LAYERS = ("tensor_parallel", "expert_parallel")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 1


# What is read of a DeepSpeed JSON here and by the planner; the rest is DeepSpeed's to check.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "zero_optimization": (_is_object, "an object"),
    "zero_optimization.stage": (
        lambda value: type(value) is int and value in range(4), "a ZeRO stage from 0 to 3",
    ),
    **{
        f"zero_optimization.offload_{what}": (lambda v: v is None or _is_object(v), "an object")
        for what in ("optimizer", "param")
    },
    **{
        f"zero_optimization.{size}": (_is_count, "a number of at least 1")
        for size in ("reduce_bucket_size", "sub_group_size", "zero_hpz_partition_size")
    },
    **{
        f"zero_optimization.stage3_{size}": (lambda v: v == 0 or _is_count(v), "0 or more")
        for size in ("prefetch_bucket_size", "max_live_parameters")  # 0 gathers when it is needed
    },
    "data_types": (_is_object, "an object"),
    "data_types.grad_accum_dtype": (lambda value: isinstance(value, str), "the name of a dtype"),
    "communication_data_type": (lambda value: isinstance(value, str), "the name of a dtype"),
}  # fmt: skip


def config_folder() -> Path:
    """Where the built-in JSON files lie: in the wheel inside the package, else beside it."""
    package = Path(__file__).parents[2]
    return next(p for p in (package / "ds_configs", package.parent / "ds_configs") if p.is_dir())


def read_sharding(name: str) -> dict[str, Any]:
    """The JSON of a built-in name or a path.

    Raises ConfigError when there is no such file, when it is not JSON, and when it sets a number
    that the run config owns.
    """
    path, raw = _read_object(name)
    owned = [f"{key} (owned by {OWNED[key]})" for key in raw if key in OWNED]
    if owned:
        raise ConfigError(
            f"{path} sets {', '.join(owned)}",
            "only how to shard",
            "Remove it there and set the run config's key.",
        )
    split = [key for key in SPLITS_LAYERS if raw.get(key)]
    if split:
        raise ConfigError(
            f"{path} sets {', '.join(split)}",
            "layers that are whole on every rank or in the partitions of ZeRO-3",
            "Remove it there; train.deepspeed=zero3 shards all weights, and "
            "train.sequence_parallel lets ranks share a row.",
        )
    _check_kinds(raw, path)
    if "stage" not in raw.get("zero_optimization", {}):
        raise ConfigError(
            f"{path} has no zero_optimization.stage", "a ZeRO stage from 0 to 3", "Add it."
        )
    if "data_types" in raw and zero_stage(raw) < 2:
        raise ConfigError(
            f"{path} sets data_types under ZeRO stage {zero_stage(raw)}",
            "it under stage 2 or 3 only: below, gradients are added up in float32 without it",
            "Remove it there.",
        )
    if not raw["zero_optimization"].get("compute_grad_norm", True):
        raise ConfigError(
            f"{path} sets zero_optimization.compute_grad_norm to false",
            "a gradient norm, by which ranks find a gradient that is not finite",
            "Remove it there.",
        )
    for key in ("offload_optimizer", "offload_param"):
        if (raw["zero_optimization"].get(key) or {}).get("device") == "nvme":
            raise ConfigError(
                f"{path} offloads to NVMe ({key})",
                "offload to cpu, or none",
                "Set its device to cpu: checkpoints do not hold what lies on NVMe.",
            )
    return raw


def _read_object(name: str) -> tuple[Path, dict[str, Any]]:
    """The path of a DeepSpeed JSON and what it holds."""
    names = sorted(path.stem for path in config_folder().glob("*.json"))
    path = config_folder() / f"{name}.json" if name in names else Path(name)
    try:
        raw = parse_json(path.read_text())
    except OSError:
        raise ConfigError(
            f"train.deepspeed: {name!r} is no file",
            f"a path, or one of {', '.join(names)}",
            "Correct train.deepspeed.",
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error})", "a DeepSpeed JSON", "Correct it."
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {raw!r}", "a DeepSpeed JSON, an object", "Correct it.")
    return path, raw


def _check_kinds(raw: dict[str, Any], path: Path) -> None:
    """Raises ConfigError at what is of another kind than it is read as."""
    for name, (fits, expected) in KINDS.items():
        section, _, key = name.rpartition(".")
        holder = raw.get(section, {}) if section else raw
        if key in holder and not fits(holder[key]):
            raise ConfigError(f"{path} sets {name} to {holder[key]!r}", expected, "Correct it.")


def zero_stage(sharding: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON."""
    return sharding["zero_optimization"]["stage"]


def training_config(
    train: TrainSection, dtype: str, world_size: int, *, universal: bool = False
) -> dict[str, Any]:
    """The whole DeepSpeed config of a training run.

    DeepSpeed's own batch arithmetic is switched off with ones: micro-batches hold as many pairs
    as their tokens allow, and the accumulation boundary is set by hand.
    """
    config = read_sharding(train.deepspeed)
    check_optimizer(train, dtype, config)
    if train.optimizer == "muon":  # needs whole gradients, and DeepSpeed refuses it otherwise
        config["zero_optimization"] |= {"reduce_scatter": False}
    config |= _without_batch_arithmetic(world_size) | {
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # check_optimizer knows which were tested
    }
    if dtype == "bfloat16":
        # over ranks as over micro-batches: each addition in bfloat16 drops what is 1/256 of the sum
        config.setdefault("communication_data_type", "fp32")
        if zero_stage(config) >= 2:  # zero.backward does it below
            config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def check_optimizer(train: TrainSection, dtype: str, sharding: dict[str, Any]) -> None:
    """Raises ConfigError when the optimizer is not right under this sharding."""
    if train.optimizer == "adamw":
        return
    where = f"train.optimizer: {train.optimizer} with train.deepspeed {train.deepspeed}"
    if train.optimizer == "muon" and zero_stage(sharding) == 3 and train.non_finite == "skip":
        raise ConfigError(
            f"{where} and train.non_finite skip, where DeepSpeed looks only after the momentum has "
            "taken the gradient",
            "a gradient that leaves no trace when it is skipped",
            "Choose train.non_finite=stop, or train.deepspeed=zero2.",
        )
    if "offload_optimizer" in sharding["zero_optimization"]:
        raise ConfigError(
            f"{where}, which keeps the optimizer in host memory",
            "adamw, the only optimizer that DeepSpeed updates there",
            "Choose train.optimizer=adamw, or a train.deepspeed without offload.",
        )
    if train.optimizer == "adafactor" and (zero_stage(sharding) > 0 or dtype != "float32"):
        raise ConfigError(
            f"{where} and model.dtype {dtype}, where DeepSpeed hands it vectors, not matrices",
            "zero0 and float32, because on a vector it has no rows and columns to factor: it would "
            "save little and step differently on another number of ranks",
            "Choose train.optimizer=adamw_8bit to save memory under ZeRO.",
        )


def inference_config(dtype: str, world_size: int) -> dict[str, Any]:
    """ZeRO-3 without optimizer, for a reference model that does not fit one rank."""
    return read_sharding("zero3") | _without_batch_arithmetic(world_size) | {
        "bf16": {"enabled": dtype == "bfloat16"},
    }  # fmt: skip


def _without_batch_arithmetic(world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
    }
