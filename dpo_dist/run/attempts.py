"""Attempts at a stage: where their logs go, what has been tried, and whether to try again.

A launcher calls `begin` once before it starts the ranks of a stage and `judge` once after. Both
read status.json, where rank 0 wrote what became of the stage, and what other ranks wrote beside
their logs: exit codes get lost on the way through a scheduler.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.errors import EXIT_DO_NOT_RESTART, EXIT_RESTART, DPODistError, is_transient
from dpo_dist.parsing import parse_as
from dpo_dist.run.lock import refuse_if_held
from dpo_dist.run.manifest import write_json
from dpo_dist.run.pipeline import PUSH, STAGES
from dpo_dist.run.run_dir import RunDir, rank_failure_path, rank_failures, rank_log_path
from dpo_dist.run.status import read_status, update_stage, update_status

T = TypeVar("T")
# "stopped" was told to, and goes on in a new allocation; "restart" may in the one that it has
Verdict = Literal["next", "restart", "stopped", "stop"]
ORDER = tuple(stage.name for stage in (*STAGES, PUSH))
TAIL_LINES = 30
DYING_S = 240.0  # the longest that a node's NFS locks, or its lease, outlive it
LIKELY_CAUSES: dict[int, str] = {
    signal.SIGKILL: ", often out of memory",
    signal.SIGBUS: ", often a full /dev/shm or a file system that went away",
}
TOLD_TO_END = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # by whom a rank was to end
PAUSES_S = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0)  # four minutes: a file server starts again
NO_RESTARTS: dict[str, Any] = {"total": 0, "without_progress": 0, "progress": None}


class RestartLimitError(DPODistError):
    """A cap on restarts is reached; the process exits 93."""

    exit_code = EXIT_DO_NOT_RESTART


class _Failure(BaseModel):
    """What a rank other than 0 left of its end; whoever killed it knows the signal only."""

    error: str = ""
    signal: int = 0
    exit_code: int = 1
    restartable: bool = False


@dataclass(frozen=True)
class Outcome:
    """What follows an attempt, why, and the exit code to end with if nothing does."""

    verdict: Verdict
    reason: str
    exit_code: int


def begin(paths: RunDir, stage: str, caps: RestartSection, *, resubmitted: bool) -> Path | None:
    """Makes the log folder of an attempt and returns it; None when the stage is already done.

    `resubmitted` says that the launcher starts the same job again by itself: only then is a stage
    skipped for having finished, and a restart counted. Raises RestartLimitError at a cap, and
    ArtifactError when another job works in the run folder.
    """
    refuse_if_held(paths, DYING_S if resubmitted else 0.0)
    status = read_status(paths.status_path)
    stages: dict[str, Any] = status.get("stages", {})
    state = stages.get(stage, {}).get("state")
    done = stages.get(STAGES[-1].name, {}).get("state") == "finished"
    if resubmitted and (state == "finished" if stage in ORDER else done):
        return None
    restarts = dict(NO_RESTARTS)
    if resubmitted:
        restarts |= status.get("restarts", {})
        if stage in ORDER and state is not None:
            restarts = _count_restart(restarts, status.get("progress"), stage, caps)
    log_dir = new_log_dir(paths, stage)
    later = ORDER[ORDER.index(stage) + 1 :] if stage in ORDER else ()
    stages = {name: value for name, value in stages.items() if name not in later}
    update_status(
        paths.status_path,
        stages=stages | {stage: {"state": "started"}},
        restarts=restarts,
    )
    return log_dir


def new_log_dir(paths: RunDir, stage: str) -> Path:
    """Makes the log folder of the next attempt and points logs/latest to it."""
    log_dir = paths.log_dir(stage, paths.count_attempts(stage) + 1)
    log_dir.mkdir(parents=True)
    fresh = paths.logs_dir / f".latest.{os.getpid()}"
    fresh.symlink_to(log_dir.name)
    fresh.replace(paths.latest_log_link)
    return log_dir


def forget(paths: RunDir) -> None:
    """Starts a submission: no stage has been tried yet, and no restart made."""
    update_status(paths.status_path, stages={}, restarts=dict(NO_RESTARTS))


def judge(paths: RunDir, stage: str) -> Outcome:
    """What to do after the ranks of a stage have ended, whatever their exit codes were."""
    own = read_status(paths.status_path).get("stages", {}).get(stage, {})
    state = own.get("state", "never started")
    if state == "finished":
        return Outcome("next", "finished", 0)
    if state == "stopped":
        return Outcome("stopped", "stopped by a signal with everything committed", EXIT_RESTART)
    if state == "failed" and not own.get("restartable", True):
        return Outcome("stop", str(own.get("error")), int(own.get("exit_code", 1)))
    # rank 0 may have ended of another rank, or waited for it until it was killed
    failures = _rank_failures(paths, stage) if own else []
    for failure in failures:
        if not failure.get("restartable", False):
            return Outcome("stop", str(failure["error"]), int(failure["exit_code"]))
    reasons = [str(failure["error"]) for failure in failures]
    if state == "failed":
        reasons.append(f"rank 0 failed: {own.get('error')}")
    return Outcome("restart", "; ".join(reasons or [f"killed while {state}"]), EXIT_RESTART)


def died_of(number: int) -> str:
    """A death by signal, in words."""
    return f"killed by signal {number}{LIKELY_CAUSES.get(number, '')}"


def note_death(log_dir: Path, rank: int, returncode: int) -> str:
    """Leaves for `judge` that a rank ended with the negative `returncode`; what it died of."""
    # as slurm/task.sh does
    failure = {"signal": -returncode, "exit_code": 128 - returncode, "restartable": True}
    with contextlib.suppress(OSError):  # for words only
        write_json(rank_failure_path(log_dir, rank), failure)
    return died_of(-returncode)


def note_end(paths: RunDir, stage: str) -> None:
    """Says in status.json that a stage failed when rank 0 was killed before it could say so."""
    own = read_status(paths.status_path).get("stages", {}).get(stage, {})
    failures = _rank_failures(paths, stage)
    if failures and own.get("state") in ("started", "running"):
        update_stage(paths.status_path, stage, "failed", **failures[0])


def worth_another(paths: RunDir, stage: str, code: int) -> bool:
    """Whether the next attempt at a stage of a run may end better than the last one, which left
    with `code`: it hung, failed of what passes, or lost a rank. One that was told to stop was
    meant to."""
    own = read_status(paths.status_path).get("stages", {}).get(stage, {})
    passes = code == EXIT_RESTART and own.get("state") != "stopped"
    killed = {failure["signal"] for failure in _rank_failures(paths, stage) if failure["signal"]}
    return stage in ORDER and ("late" in own or passes or bool(killed - TOLD_TO_END))


def patiently(work: Callable[[], T], pauses: Sequence[float] = PAUSES_S) -> T:
    """What `work` returns, tried again after each pause while its error is one that passes.

    For a launcher, which nobody starts again; a rank leaves with 75 and is. Raises what the last
    try raises, and what does not pass at once.
    """
    for pause in pauses:
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            print(f"{error}; trying again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    return work()


def _rank_failures(paths: RunDir, stage: str) -> list[dict[str, Any]]:
    """What the last attempt's ranks other than 0 failed of, and which ranks were killed."""
    log_dir = paths.log_dir(stage, paths.count_attempts(stage))
    failures = []
    for rank, path in rank_failures(log_dir).items():
        try:
            failure = parse_as(_Failure, path.read_bytes())
        except ValueError:  # cut short, as by a full disk: what it failed of is not known
            failure = _Failure(error=f"{path} is not readable", restartable=True)
        error = failure.error or died_of(failure.signal)
        failures.append(failure.model_dump() | {"error": f"rank {rank}: {error}"})
    return failures


def first_failure(log_dir: Path) -> str:
    """The end of the log that tells of an error first; "" when none does."""
    failed = [
        path
        for path in log_dir.glob(rank_log_path(log_dir, 0).name.replace("0000", "*"))
        if any(word in path.read_text(errors="replace") for word in ("Traceback", "error: "))
    ]
    if not failed:
        return ""
    first = min(failed, key=lambda path: path.stat().st_mtime)
    lines = first.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"the end of {first}:", *lines])


def _count_restart(
    restarts: dict[str, Any], progress: Any, stage: str, caps: RestartSection
) -> dict[str, Any]:
    """One restart more; it made progress when something was committed since the last one."""
    stuck = restarts["without_progress"] + 1 if progress == restarts["progress"] else 0
    counted = {
        "total": restarts["total"] + 1, "without_progress": stuck, "progress": progress,
    }  # fmt: skip
    for key, number, cap in (
        ("max_restarts", counted["total"], caps.max_restarts),
        ("max_without_progress", stuck, caps.max_without_progress),
    ):
        if number > cap:
            raise RestartLimitError(
                f"{stage} would be restarted for the {number}. time "
                f"({counted['total']} restarts, {stuck} in a row without progress)",
                f"at most {cap} (restart.{key})",
                "Look into logs/latest for what stops it, then submit again: counts start anew.",
            )
    return counted
