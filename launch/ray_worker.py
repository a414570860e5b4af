"""One worker of a stage's group: begins the attempt, runs its rank, judges what became of it."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from ray import train
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray_rank import rendezvous, run_rank

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import DPODistError
from dpo_dist.run import attempts
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status, update_stage
from dpo_dist.run.topology import Topology

POLL_S = 1.0
FINAL_STATE_S = 30.0  # rank 0 writes what became of a stage a little after the others have left


class SharedGPUs(Backend):
    """Every worker of a node sees all its GPUs, as NCCL wants it for direct copies."""

    # Developer API: the public way is an environment variable, which holds for every trainer.
    share_cuda_visible_devices = True


class SharedGPUsConfig(BackendConfig):
    """Names the backend to Ray Train."""

    @property
    def backend_cls(self) -> type[Backend]:
        return SharedGPUs


def work(job: dict[str, Any]) -> None:
    """One worker: starts its rank and waits for it. An exception makes Ray start all again."""
    context = train.get_context()
    rank = context.get_world_rank()
    config = load_config(Path(job["config_path"]))
    paths, stage = RunDir(config.run.dir), job["stage"]
    place = broadcast_from_rank_zero(begin(paths, stage, config) if rank == 0 else None)
    if place is None:
        return  # finished before a worker was lost, or at a cap: status.json says which
    address, port, log_dir = place
    topology = Topology(
        rank, context.get_world_size(), context.get_local_rank(),
        context.get_local_world_size(), address, port,
    )  # fmt: skip
    code = run_rank(job, topology, Path(log_dir), paths)
    outcome = settled(paths, stage, code)
    if outcome.verdict in ("restart", "stopped"):
        raise RuntimeError(f"rank {rank} of {stage} ended with {code}: {outcome.reason}")


def begin(paths: RunDir, stage: str, config: RunConfig) -> tuple[str, int, str] | None:
    """(address, port, log folder) for all ranks, None when there is nothing to start: the stage had
    finished when a worker was lost, a rank failed for good, restarts have come to an end, or
    another job has the folder."""
    if attempts.judge(paths, stage).verdict == "stop":
        return None
    try:
        log_dir = attempts.begin(paths, stage, config.restart, resubmitted=True)
    except DPODistError as error:
        if error.transient:
            raise  # Ray starts the group again
        update_stage(
            paths.status_path, stage, "failed",
            error=str(error), exit_code=error.exit_code, restartable=False,
        )  # fmt: skip
        return None
    return None if log_dir is None else (*rendezvous(), str(log_dir))


def settled(paths: RunDir, stage: str, code: int) -> attempts.Outcome:
    """What became of the stage, once rank 0 has written it or has not for too long."""
    deadline = time.monotonic() + FINAL_STATE_S
    while code > 0 and time.monotonic() < deadline:
        if _has_ended(paths, stage):
            break
        time.sleep(POLL_S)
    outcome = attempts.judge(paths, stage)
    if outcome.verdict == "stop" and not _has_ended(paths, stage):
        # Rank 0 waits for the rank that failed: Ray ends it, and `begin` starts nothing again.
        return dataclasses.replace(outcome, verdict="restart")
    return outcome


def _has_ended(paths: RunDir, stage: str) -> bool:
    state = read_status(paths.status_path).get("stages", {}).get(stage, {}).get("state")
    return state in ("finished", "stopped", "failed")
