import json
from pathlib import Path

import pytest

from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.sharding import ds_config
from dpo_dist.errors import ConfigError

NAMES = ("zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")


def write(tmp_path: Path, value: object) -> str:
    path = tmp_path / "own.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_built_in_files_only_shard(name: str) -> None:
    sharding = ds_config.read_sharding(name)
    assert ds_config.zero_stage(sharding) == int(name[4])
    assert set(sharding) <= {"zero_optimization", "zero_force_ds_cpu_optimizer"}


def test_all_files_are_tested() -> None:
    assert {path.stem for path in ds_config.config_folder().glob("*.json")} == set(NAMES)


def test_numbers_come_from_the_run_config() -> None:
    config = ds_config.training_config(
        TrainSection(deepspeed="zero2", max_grad_norm=0.5), "bfloat16", 6
    )
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["train_batch_size"] == 6
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert "checkpoint" not in config
    fp32 = ds_config.training_config(TrainSection(), "float32", 1, universal=True)
    assert fp32["bf16"] == {"enabled": False}
    assert fp32["checkpoint"] == {"load_universal": True}


def test_an_own_json_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 1}})
    assert ds_config.zero_stage(ds_config.read_sharding(path)) == 1


@pytest.mark.parametrize("key", sorted(ds_config.OWNED))
def test_an_owned_number_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 1}, key: 1})
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding(path)
    assert str(caught.value) == (
        f"{path} sets {key} (owned by {ds_config.OWNED[key]}); expected only how to shard. "
        "Remove it "
        "there and set the run config's key."
    )


@pytest.mark.parametrize("key", ds_config.SPLITS_LAYERS)
def test_layers_split_over_ranks_are_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 1}, key: {"autotp_size": 2}})
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding(path)
    assert str(caught.value) == (
        f"{path} sets {key}; expected layers that are whole on every rank or in the partitions of "
        "ZeRO-3. Remove it there; train.deepspeed=zero3 shards all weights, and "
        "train.sequence_parallel lets ranks share a row."
    )


def test_offload_to_nvme_is_refused(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch"}}
    path = write(tmp_path, {"zero_optimization": zero})
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding(path)
    assert str(caught.value) == (
        f"{path} offloads to NVMe (offload_param); expected offload to cpu, or none. "
        "Set its device to cpu: checkpoints do not hold what lies on NVMe."
    )


def test_a_sharding_without_a_gradient_norm_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 1, "compute_grad_norm": False}})
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding(path)
    assert str(caught.value) == (
        f"{path} sets zero_optimization.compute_grad_norm to false; expected a gradient norm, by "
        "which ranks find a gradient that is not finite. Remove it there."
    )


def test_muon_under_zero3_cannot_skip() -> None:
    train = TrainSection(optimizer="muon", deepspeed="zero3", non_finite="skip")
    with pytest.raises(ConfigError) as caught:
        ds_config.training_config(train, "bfloat16", 2)
    assert str(caught.value) == (
        "train.optimizer: muon with train.deepspeed zero3 and train.non_finite skip, where "
        "DeepSpeed looks only after the momentum has taken the gradient; expected a gradient that "
        "leaves no trace when it is skipped. Choose train.non_finite=stop, or "
        "train.deepspeed=zero2."
    )


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding("zero9")
    assert str(caught.value) == (
        "train.deepspeed: 'zero9' is no file; expected a path, or one of zero0, zero1, "
        "zero2, zero3, "
        "zero3_hpz, zero3_offload. Correct train.deepspeed."
    )
    with pytest.raises(ConfigError, match="is not JSON .*; expected a DeepSpeed JSON"):
        ds_config.read_sharding(write(tmp_path, "{"))
    with pytest.raises(ConfigError, match="has no zero_optimization.stage; expected a ZeRO stage"):
        ds_config.read_sharding(write(tmp_path, {"zero_optimization": {}}))


def test_data_types_below_zero2_are_refused(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    path = write(tmp_path, raw)
    with pytest.raises(ConfigError) as caught:
        ds_config.read_sharding(path)
    assert str(caught.value) == (
        f"{path} sets data_types under ZeRO stage 1; expected it under stage 2 or 3 only: below, "
        "gradients are added up in float32 without it. Remove it there."
    )
