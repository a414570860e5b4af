"""Which checkpoint of a run stands; one process, checkpoints without weights."""

import os
import shutil
from pathlib import Path

import pytest
from support.faults.other_user import give_away, needs_root

from dpo_dist.engine.checkpoints import checkpoint
from dpo_dist.engine.checkpoints.commit import commit, record_files
from dpo_dist.engine.checkpoints.retention import best_standing, prune
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import COMMIT_NAME, TRAIN_STATE_NAME


def plain(checkpoints_dir: Path, step: int, content: bytes = b"weights") -> Path:
    """A committed checkpoint that holds one file."""
    step_dir = checkpoints_dir / f"step-{step:06d}"
    step_dir.mkdir(parents=True)
    (step_dir / "mp_rank_00_model_states.pt").write_bytes(content)
    state = TrainState(step, 6 * step, 0.5, {}, 1, 0)
    (step_dir / TRAIN_STATE_NAME).write_text(state.to_json())
    commit(step_dir, record_files(step_dir))
    return step_dir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 200, 300):
        plain(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.mark.fault(
    17,
    "a path in an empty run folder",
    becomes="an error; a fresh start under `auto` only",
)
def test_no_checkpoint_is_a_fresh_start_only_under_auto(tmp_path: Path) -> None:
    assert checkpoint.choose_resume(tmp_path / "checkpoints", "auto") is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.newest_committed(tmp_path / "checkpoints") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.choose_resume(tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-1")


def test_the_newest_is_by_number_and_a_copy_may_have_any_name(run: Path, tmp_path: Path) -> None:
    plain(run, 1_000_000)
    (run / "step-2000000").write_text("a file")
    (run / "notes").mkdir()
    with_six = checkpoint.newest_committed(run)
    assert with_six == run / "step-1000000"
    copy = tmp_path / "best"
    shutil.copytree(run / "step-000200", copy)
    assert checkpoint.choose_resume(run, copy) == copy


@pytest.mark.fault(
    13,
    "two damaged checkpoints of three",
    becomes="set aside with the reason, the third is taken",
)
def test_damaged_ones_go_to_quarantine_and_an_older_one_is_taken(run: Path) -> None:
    (run / "step-000300" / "mp_rank_00_model_states.pt").write_bytes(b"weighty")
    os.truncate(run / "step-000200" / "mp_rank_00_model_states.pt", 2)
    (run / ".step-000400.partial").mkdir()
    assert checkpoint.newest_committed(run) == run / "step-000100"
    reasons = {path.name: path.read_text() for path in (run / "quarantine").glob("*.txt")}
    assert set(reasons) == {"step-000200.reason.txt", "step-000300.reason.txt"}
    assert "has another content than was committed" in reasons["step-000300.reason.txt"]
    assert "has 2 bytes instead of 7" in reasons["step-000200.reason.txt"]
    assert (run / "quarantine" / "step-000300" / TRAIN_STATE_NAME).exists()


def test_a_named_damaged_one_is_an_error_and_stays(run: Path) -> None:
    shard = run / "step-000300" / "mp_rank_00_model_states.pt"
    shard.write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match="has another content.*Resume from another"):
        checkpoint.choose_resume(run, run / "step-000300")
    assert shard.exists()


def test_a_folder_under_another_step_is_put_aside(run: Path) -> None:
    (run / "step-000300").rename(run / "step-000400")
    assert checkpoint.newest_committed(run) == run / "step-000200"
    reason = (run / "quarantine" / "step-000400.reason.txt").read_text()
    assert reason == f"{run}/step-000400 holds step 300\n"


@needs_root
def test_truth_06_what_belongs_to_another_user_is_neither_moved_nor_passed_over(run: Path) -> None:
    give_away(run)
    assert checkpoint.choose_resume(run, "auto") == run / "step-000300"
    with pytest.raises(CheckpointError, match="step-000300 belongs to user 12345"):
        checkpoint.check_ours(run / "step-000300", [])
    checkpoint.check_ours(run / "step-000300", [12345])
    prune(run, keep=2)
    (run / "step-000300" / COMMIT_NAME).unlink()
    assert checkpoint.choose_resume(run, "auto") == run / "step-000200"
    assert sorted(os.listdir(run)) == ["step-000200", "step-000300"], "and the damaged one stays"


@pytest.mark.fault(
    33,
    "three checkpoints, all damaged",
    becomes="a stop that names each reason; nothing is moved",
)
def test_truth_06_when_all_are_refused_auto_stops_and_moves_nothing(run: Path) -> None:
    (run / "step-000300" / "mp_rank_00_model_states.pt").write_bytes(b"weighty")
    os.truncate(run / "step-000200" / "mp_rank_00_model_states.pt", 2)
    (run / "step-000100" / COMMIT_NAME).unlink()
    for _ in range(2):  # what is started again ends the same way
        with pytest.raises(CheckpointError) as caught:
            checkpoint.choose_resume(run, "auto")
        assert str(caught.value) == (
            f"none of the 3 checkpoints in {run} can be used:\n"
            f"{run}/step-000300/mp_rank_00_model_states.pt has another content than was committed\n"
            f"{run}/step-000200/mp_rank_00_model_states.pt has 2 bytes instead of 7\n"
            f"{run}/step-000100 has no COMMITTED marker\n"
            "expected one to go on from. Nothing was moved: put one back from a copy, or move "
            f"{run} away to train anew from the first step."
        )
        assert sorted(os.listdir(run)) == ["step-000100", "step-000200", "step-000300"]


def test_pruning_spares_the_best_that_stands(run: Path) -> None:
    plain(run, 400)
    prune(run, keep=2, ranked=[999, 100, 200])
    assert sorted(os.listdir(run)) == ["step-000100", "step-000300", "step-000400"]
    prune(run, keep=2, ranked=[300, 100])
    assert sorted(os.listdir(run)) == ["step-000300", "step-000400"]


def test_the_best_is_the_first_of_the_ranked_that_stands(run: Path) -> None:
    (run / "step-000300" / COMMIT_NAME).unlink()
    assert best_standing(run, [50, 300, 100, 200]) == run / "step-000100"
    assert best_standing(run, []) is None


def test_pruning_keeps_the_newest_whole_ones(run: Path) -> None:
    (run / "step-000300" / COMMIT_NAME).unlink()
    plain(run, 50)
    prune(run, keep=2)
    assert sorted(os.listdir(run)) == ["step-000100", "step-000200", "step-000300"]
