from pathlib import Path

import pytest

from dpo_dist.config.resume_identity import LATER_KEYS, training_identity
from dpo_dist.config.run_config import parse_config
from dpo_dist.engine.checkpoints.train_state import (
    TrainState,
    check_resume,
    check_stage,
    read_train_state,
)
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import TRAIN_STATE_NAME


@pytest.mark.fault(
    16,
    "another seed, other pairs, another model",
    becomes="refused with every difference",
)
def test_every_difference_is_named(tmp_path: Path) -> None:
    state = TrainState(1, 6, 0.5, {"run.seed": "1", "pairs": "a", "model": "m"}, 2, 3, {})
    check_resume(tmp_path, state, dict(state.digests))
    with pytest.raises(CheckpointError) as caught:
        check_resume(tmp_path, state, {"run.seed": "2", "pairs": "b", "reference": "r"})
    assert caught.value.found == (
        f"{tmp_path} was trained with other settings or inputs "
        '(model: "m" -> null; pairs: "a" -> "b"; reference: null -> "r"; '
        'run.seed: "1" -> "2")'
    )


def test_keys_that_earlier_versions_had_not_do_not_stop_a_resume(tmp_path: Path) -> None:
    """A checkpoint of then has no entry for them; one that is set is a difference still."""
    given = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": [{"path": "p"}]}}
    then = training_identity(parse_config(given))
    assert not {*then} & {*LATER_KEYS}
    state = TrainState(1, 6, 0.5, then, 2, 3, {})
    check_resume(tmp_path, state, training_identity(parse_config(given)))
    now = training_identity(parse_config(given | {"train": {"min_lr_rate": 0.1}}))
    with pytest.raises(CheckpointError, match=r'\(train.min_lr_rate: null -> "0.1"\)'):
        check_resume(tmp_path, state, now)


def test_another_stage_is_refused(tmp_path: Path) -> None:
    state = TrainState(1, 6, 0.5, {}, 2, 3, {})
    check_stage(tmp_path, state, 3)
    with pytest.raises(CheckpointError) as caught:
        check_stage(tmp_path, state, 2)
    assert str(caught.value) == (
        f"{tmp_path} holds shards of ZeRO stage 3, train.deepspeed is of stage 2; expected "
        "stage 3. "
        "Choose a train.deepspeed of that stage to continue."
    )


def test_an_unreadable_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train_state.json is not readable \(\[Errno 2\]"):
        read_train_state(tmp_path)
    (tmp_path / TRAIN_STATE_NAME).write_text('{"stepp": 1}')
    with pytest.raises(CheckpointError, match="stepp: unknown key"):
        read_train_state(tmp_path)


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = TrainState(7, 42, 0.75, {"model": "m"}, 2, 3, [{"step": 5, "eval_loss": 0.5}])
    (tmp_path / TRAIN_STATE_NAME).write_text(state.to_json())
    assert read_train_state(tmp_path) == state
    assert {"python", "torch", "deepspeed", "transformers", "peft"} == set(state.versions)
