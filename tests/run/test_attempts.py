"""Attempts: what is skipped, what counts as a restart, when it ends, and what follows a stage."""

import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.errors import EXIT_DO_NOT_RESTART
from dpo_dist.run import attempts
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status, update_stage, update_status


def caps(**values: int) -> RestartSection:
    return RestartSection.model_validate(values)


def again(paths: RunDir, stage: str, **values: int) -> Path | None:
    return attempts.begin(paths, stage, caps(**values), resubmitted=True)


def test_every_attempt_has_a_log_folder_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    for number in (1, 2):
        log_dir = attempts.begin(paths, "train", caps(), resubmitted=False)
        assert log_dir == paths.log_dir("train", number) and log_dir.is_dir()
        assert paths.latest_log_link.resolve() == log_dir.resolve()


def test_a_resubmitted_job_skips_what_has_finished_and_a_new_one_does_not(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    attempts.begin(paths, "prepare", caps(), resubmitted=False)
    update_stage(paths.status_path, "prepare", "finished")
    assert again(paths, "prepare") is None
    assert again(paths, "doctor") is not None, "nodes are looked at each time"
    assert again(paths, "train") is not None
    assert attempts.begin(paths, "prepare", caps(), resubmitted=False) is not None
    assert set(read_status(paths.status_path)["stages"]) == {"prepare", "doctor"}, (
        "what came after it has to be done again"
    )


@pytest.mark.fault(8, "every stage of a finished run resubmitted", becomes="nothing runs")
def test_a_finished_run_does_nothing_when_resubmitted(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    for stage in attempts.ORDER:
        attempts.begin(paths, stage, caps(), resubmitted=False)
        update_stage(paths.status_path, stage, "finished")
    assert [again(paths, stage) for stage in ("doctor", *attempts.ORDER)] == [None] * 7


@pytest.mark.fault(
    8,
    "restart after restart, each with progress",
    becomes="93 at `restart.max_restarts`",
)
def test_restarts_are_counted_until_a_cap(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    attempts.begin(paths, "train", caps(), resubmitted=False)
    for number in (1, 2):
        update_status(paths.status_path, progress=f"step-{number}")
        again(paths, "train", max_restarts=2)
        assert read_status(paths.status_path)["restarts"]["total"] == number
    with pytest.raises(attempts.RestartLimitError) as error:
        again(paths, "train", max_restarts=2)
    assert error.value.exit_code == EXIT_DO_NOT_RESTART == 93
    assert str(error.value) == (
        "train would be restarted for the 3. time (3 restarts, 1 in a row without progress); "
        "expected at most 2 (restart.max_restarts). Look into logs/latest for what stops it, then "
        "submit again: counts start anew."
    )
    attempts.begin(paths, "train", caps(), resubmitted=False)
    assert read_status(paths.status_path)["restarts"]["total"] == 0


@pytest.mark.fault(
    8,
    "restart after restart without progress",
    becomes="93 at `restart.max_without_progress`",
)
def test_restarts_without_progress_end_sooner(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    attempts.begin(paths, "train", caps(), resubmitted=False)
    update_status(paths.status_path, progress="step-1")
    again(paths, "train", max_without_progress=1)  # something was committed before
    again(paths, "train", max_without_progress=1)
    with pytest.raises(attempts.RestartLimitError, match=r"at most 1 \(restart.max_without_prog"):
        again(paths, "train", max_without_progress=1)
    update_status(paths.status_path, progress="step-2")
    again(paths, "train", max_without_progress=1)
    assert read_status(paths.status_path)["restarts"]["without_progress"] == 0


@pytest.mark.parametrize(
    ("state", "fields", "verdict", "code"),
    [
        ("finished", {}, "next", 0),
        ("stopped", {}, "stopped", 75),
        ("running", {}, "restart", 75),
        ("started", {}, "restart", 75),
        ("failed", {"error": "e", "exit_code": 1, "restartable": True}, "restart", 75),
        ("failed", {"error": "e", "exit_code": 2, "restartable": False}, "stop", 2),
    ],
)
def test_what_follows(
    tmp_path: Path, state: str, fields: dict[str, Any], verdict: str, code: int
) -> None:
    paths = RunDir(tmp_path)
    update_stage(paths.status_path, "train", state, **fields)
    outcome = attempts.judge(paths, "train")
    assert (outcome.verdict, outcome.exit_code) == (verdict, code)


@pytest.mark.parametrize(
    ("fields", "died_of", "code", "worth"),
    [
        ({"state": "stopped"}, None, 75, False),
        ({"state": "failed", "restartable": True}, None, 75, True),
        ({"state": "failed", "restartable": True}, None, 1, False),
        ({"state": "failed", "late": [{}]}, None, 75, True),
        ({"state": "running"}, signal.SIGKILL, 137, True),
        ({"state": "failed", "restartable": True}, signal.SIGBUS, 1, True),  # rank 0 lost its peer
        ({"state": "running"}, signal.SIGTERM, 143, False),
    ],
)
def test_what_is_worth_another_attempt_on_this_machine(
    tmp_path: Path, fields: dict[str, Any], died_of: int | None, code: int, worth: bool
) -> None:
    paths = RunDir(tmp_path)
    log_dir = attempts.begin(paths, "train", caps(), resubmitted=False)
    update_stage(paths.status_path, "train", **fields)
    if died_of is not None and log_dir is not None:
        attempts.note_death(log_dir, 1, -died_of)
    assert attempts.worth_another(paths, "train", code) is worth
    assert not attempts.worth_another(paths, "evaluate", code)


def test_forgetting_starts_a_submission(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    attempts.begin(paths, "train", caps(), resubmitted=False)
    again(paths, "train")
    attempts.forget(paths)
    again(paths, "train")
    assert read_status(paths.status_path)["restarts"]["total"] == 0


@pytest.mark.fault(
    5,
    "logs of three ranks, of which two failed",
    becomes="the first traceback is the one shown",
)
def test_the_first_failure_is_the_one_shown(tmp_path: Path) -> None:
    for rank, text in ((0, "fine"), (2, "Traceback: connection lost"), (1, "Traceback: the cause")):
        (tmp_path / f"rank{rank:04d}.log").write_text(text)
        import os

        os.utime(
            tmp_path / f"rank{rank:04d}.log", (10 - rank, 100 - rank * (1 if rank == 2 else 50))
        )
    shown = attempts.first_failure(tmp_path)
    assert shown.splitlines() == [
        f"the end of {tmp_path / 'rank0001.log'}:",
        "Traceback: the cause",
    ]
    assert attempts.first_failure(tmp_path / "none") == ""
