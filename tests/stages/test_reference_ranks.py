"""The reference pass and training on ranks that see different disks, and what both refuse first."""

import sys
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.tiny_run import make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ConfigError, DataError, DPODistError
from dpo_dist.model_files import files as model_files
from dpo_dist.run.topology import SINGLE_PROCESS, from_environment
from dpo_dist.stages import prepare, reference, train

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs are there."""
    path = make_run(tmp_path_factory.mktemp("disks"))
    prepare.run(load_config(path))
    return path


def own_disk_worker(run_yaml: str, stage: str, store: str) -> list[str]:
    """Runs a stage with a store of this rank's own; the weight files that this rank hashed."""
    hashed: list[str] = []
    digest_of = model_files._cached_digest

    def digest_of_file(path: Path) -> str:
        hashed.append(path.name)
        return digest_of(path)

    model_files._cached_digest = digest_of_file
    own_store = f"reference.store_dir={store}-{from_environment().rank}"
    overrides = [own_store, "train.max_steps=1"]
    stages = {"reference": reference, "train": train}
    stages[stage].run(load_config(Path(run_yaml), overrides))
    return hashed


@pytest.mark.fault(
    11,
    "a store on rank 0 that rank 1 does not have",
    becomes="rank 0 decides for all",
)
def test_only_rank_0_looks_at_the_store_and_reads_the_weights(run_yaml: Path) -> None:
    store = run_yaml.parent / "store"
    arguments = str(run_yaml), "reference", str(store)
    for _ in ("scores", "finds rank 0's store complete and the other's absent"):
        first, second = run_ranks(2, own_disk_worker, *arguments)
        assert "model.safetensors" in first and second == []
    assert list(run_yaml.parent.glob("store-*")) == [run_yaml.parent / "store-0"]
    for _ in ("trains", "is finished"):
        first, second = run_ranks(2, own_disk_worker, str(run_yaml), "train", str(store))
        assert "model.safetensors" in first and second == []


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["train.micro_batch_tokens=20"], DataError, "expected at most micro_batch_tokens = 20"),
        (["train.global_batch_size=41"], DataError, "expected at least one global batch of 41"),
        (["train.deepspeed=zero9"], ConfigError, "train.deepspeed: 'zero9' is no file"),
        (
            ["train.optimizer=adafactor", "train.deepspeed=zero3"],
            ConfigError,
            "train.optimizer: adafactor with train.deepspeed zero3",
        ),
        (["logging.wandb=true"], ConfigError, "logging.wandb is set, and wandb is not installed"),
        (
            ["model.quantization=nf4", "adapter.rank=4"],
            ConfigError,
            "model.quantization: nf4, and bitsandbytes is not installed",
        ),
        (
            ["train.optimizer=paged_adamw"],
            ConfigError,
            "train.optimizer: paged_adamw, and bitsandbytes is not installed",
        ),
    ],
)
def test_what_training_refuses_without_a_model_is_refused_before_the_reference_pass(
    run_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    kind: type[DPODistError],
    message: str,
) -> None:
    for package in ("bitsandbytes", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    for variable, place in SINGLE_PROCESS.environment().items():
        monkeypatch.setenv(variable, place)
    config = load_config(run_yaml, [*overrides, "reference.store_dir=/nowhere"])
    for stage in (reference, train):
        with pytest.raises(kind) as error:
            stage.run(config)
        assert message in str(error.value)
