"""The reference pass as it is interrupted, damaged and asked for again: FAULTS 20 to 22."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from support.faults.at_call import struck
from support.ranks import started_ranks
from support.tiny_run import NUM_EVAL, NUM_TRAIN, make_run, same_training, succeed_on

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import complete_store

pytestmark = pytest.mark.timeout(600)
TOTAL = NUM_TRAIN + NUM_EVAL
SMALL = "reference.micro_batch_tokens=100"  # many waves, and so many parts


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there."""
    path = make_run(tmp_path_factory.mktemp("reference_pass"))
    succeed_on(1, "prepare", path)
    succeed_on(2, "reference", path, SMALL)
    return path


def parts_of(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("reference/**/part-*.rows"))


def rows_in(part: Path) -> int:
    return (part.stat().st_size - 80) // 24  # test_a_part_is_80_bytes_and_24_a_row_as_documented


def scored_in(said: str) -> int:
    found = re.search(rf"reference: (\d+) of {TOTAL} pairs to score", said)
    assert found, said
    return int(found[1])


@pytest.mark.fault(20, "SIGKILL of a rank at 60 % of the reference pass", becomes="goes on at 60 %")
@pytest.mark.fault(
    20, "a bit of one part flipped, then the pass again", becomes="that part alone is scored again"
)
@pytest.mark.slow
def test_fault_20_a_killed_pass_goes_on_and_a_damaged_part_is_scored_again(run_yaml: Path) -> None:
    whole, out = run_yaml.parent / "out", run_yaml.parent / "killed"
    shutil.copytree(whole / "pairs", out / "pairs")
    rows, waves = 0, 0
    for part in parts_of(whole):  # one a wave, in order
        if rows >= 0.6 * TOTAL:
            break
        rows, waves = rows + rows_in(part), waves + 1
    arguments = ["reference", str(run_yaml), SMALL, f"run.dir={out}"]
    fault = f"kill@reference.part={waves + 1},rank=0"
    with started_ranks(2, struck, fault, *arguments) as ranks:
        results = ranks.wait(120, grace_s=30)
    assert results[0].exit_code == -signal.SIGKILL and results[1].exit_code == 1
    assert sum(map(rows_in, parts_of(out))) == rows
    assert scored_in(succeed_on(2, *arguments)) == TOTAL - rows
    damaged = parts_of(out)[1]
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    assert scored_in(succeed_on(2, *arguments)) == rows_in(parts_of(out)[-1]) < TOTAL / 2
    assert "current" in succeed_on(2, *arguments)


def hit(run_yaml: Path, *overrides: str) -> bool:
    """Whether the store of the run holds all that a run with these settings needs."""
    config = load_config(run_yaml, overrides)
    pairs = open_pairs(config.run.dir / "pairs", "train")
    return complete_store(RunModels(config), pairs.keys) is not None


@pytest.mark.fault(
    21,
    "the same paths with new weights, another template, another max_length, another dtype",
    becomes="a miss each time",
)
@pytest.mark.fault(21, "another learning rate, another beta", becomes="a hit")
def test_fault_21_what_the_reference_depends_on(run_yaml: Path, tmp_path: Path) -> None:
    store = f"reference.store_dir={run_yaml.parent / 'out' / 'reference'}"
    assert hit(run_yaml, store)
    assert hit(run_yaml, store, "train.learning_rate=1e-4", "objective.beta=0.1")
    assert not hit(run_yaml, store, "model.dtype=bfloat16")
    for number, other in enumerate(("data.chat_template=zephyr", "data.max_length=35")):
        settings = (other, f"run.dir={tmp_path / str(number)}")
        succeed_on(1, "prepare", run_yaml, *settings)
        assert not hit(run_yaml, store, *settings), other
    folder = tmp_path / "model"
    shutil.copytree(run_yaml.parent / "model", folder)
    assert hit(run_yaml, store, f"model.path={folder}"), "the content counts, not the path"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not hit(run_yaml, store, f"model.path={folder}")


@pytest.mark.fault(
    22,
    "training after its own reference pass, and on the store of another run",
    becomes="metrics and weights equal to the bit",
)
@pytest.mark.slow
def test_fault_22_a_cold_and_a_warm_store_train_alike(run_yaml: Path) -> None:
    cold, warm = run_yaml.parent / "out", run_yaml.parent / "warm"
    shutil.copytree(cold / "pairs", warm / "pairs")
    settings = [f"run.dir={warm}", f"reference.store_dir={cold / 'reference'}", SMALL]
    assert "current" in succeed_on(2, "reference", run_yaml, *settings)
    succeed_on(2, "train", run_yaml, SMALL, "train.max_steps=4")
    succeed_on(2, "train", run_yaml, *settings, "train.max_steps=4")
    same_training(cold, warm, 4)
