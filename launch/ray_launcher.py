"""Run all stages on a Ray cluster.

    ray job submit --working-dir . -- python launch/ray_launcher.py run.yaml [section.key=value ...]
    python launch/ray_launcher.py run.yaml ...        on a node of a running cluster

Every rank is a process of its own, started by a Ray Train worker with the argv and environment of
any other launcher, and gone with it. When a worker or a node is lost, Ray starts the group again
and the run goes on from its own newest checkpoint. Exits with the code of the stage that failed.
DPO_STAGES="train export" in the environment runs these stages only.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Ray would install a package environment of its own on the workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# `_is_draining` is ours: Ray Train's is a barrier of all workers, and they end at different times.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

try:
    import ray
except ImportError:
    sys.exit("error: ray is not installed; expected the extra `ray`. pip install 'dpo-dist[ray]'")
from ray import train
from ray._private import state as ray_state  # nothing public tells of a node to be drained
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_dist.config.cluster_section import RaySection
from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import EXIT_RESTART, ClusterError, DPODistError
from dpo_dist.run import attempts
from dpo_dist.run.local_ranks import die_with_parent
from dpo_dist.run.lock import refuse_if_held
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.pipeline import DOCTOR, Stage, stage_argv, stages_of
from dpo_dist.run.run_dir import RunDir, rank_log_path
from dpo_dist.run.status import read_status, update_stage
from dpo_dist.run.topology import Topology

POLL_S = 1.0
FINAL_STATE_S = 30.0  # rank 0 writes what became of a stage a little after the others have left
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "pairs_per_second", "step")


class _SharedGPUs(Backend):
    """Every worker of a node sees all its GPUs, as NCCL wants it for direct copies."""

    share_cuda_visible_devices = True


class _SharedGPUsConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedGPUs


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        sys.exit(run(Path(sys.argv[1]).absolute(), sys.argv[2:]))
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def run(config_path: Path, overrides: list[str]) -> int:
    """Runs all stages; the exit code of the run."""
    config = load_config(config_path, overrides)
    # Workers have other working directories than this process: they read the resolved config.
    section = config.run.model_copy(update={"dir": config.run.dir.absolute()})
    config = config.model_copy(update={"run": section})
    paths = RunDir(config.run.dir)
    try:
        ray.init(address="auto", log_to_driver=True, namespace="dpo-dist")
    except ConnectionError:
        raise ClusterError(
            "no Ray cluster runs here",
            "a running cluster",
            "Start one with launch/ray_up.sh, or submit with `ray job submit` (docs/ray.md).",
        ) from None
    check_resources(config.ray, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    owner = _take_run_dir(paths)
    # A job that Ray does not know: seen here, before anything of its folder is changed.
    refuse_if_held(paths, attempts.DYING_S)
    write_atomic(paths.config_path, to_yaml(config))
    attempts.forget(paths)
    chosen = os.environ.get("DPO_STAGES", "").split()
    for stage in (DOCTOR, *stages_of(config)):
        if chosen and stage.name not in chosen:
            continue
        if stage.name == "reference" and config.ray.reference_tasks:
            _score_in_tasks(config)
        _run_stage(stage, config)
        outcome = attempts.judge(paths, stage.name)
        if outcome.verdict != "next":
            print(f"{stage.name}: {outcome.reason}", file=sys.stderr, flush=True)
            print(attempts.first_failure(paths.latest_log_link), file=sys.stderr, flush=True)
            return outcome.exit_code or EXIT_RESTART
    del owner
    return 0


def count_workers(section: RaySection, nodes: list[dict[str, float]]) -> int:
    """Workers that fit on the nodes, given the resources of each and the placement."""
    per_worker = {"GPU": section.gpus_per_worker, "CPU": section.cpus_per_worker}
    expected = {name: amount for name, amount in per_worker.items() if amount > 0}
    fitting = [
        int(min(node.get(name, 0.0) // amount for name, amount in expected.items()))
        for node in nodes
    ]
    if section.placement == "STRICT_PACK":  # all on one node
        return max(fitting, default=0)
    if section.placement == "STRICT_SPREAD":  # one a node
        fitting = [min(number, 1) for number in fitting]
    return sum(fitting)


def check_resources(section: RaySection, nodes: list[dict[str, float]]) -> None:
    """Raises ClusterError when the cluster is too small: Ray would wait for ever."""
    fewest = section.min_workers or section.workers
    possible = count_workers(section, nodes)
    if possible < fewest:
        there = ", ".join(
            f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} CPUs" for node in nodes
        )
        strict = f" placed {section.placement}" if section.placement.startswith("STRICT") else ""
        raise ClusterError(
            f"the cluster has room for {possible} workers of {section.gpus_per_worker:g} GPUs and "
            f"{section.cpus_per_worker:g} CPUs{strict} ({len(nodes)} nodes: {there})",
            f"room for {fewest}",
            "Lower ray.workers, ray.gpus_per_worker or ray.cpus_per_worker, "
            + ("set ray.placement=PACK, " if strict else "")
            + "or add nodes.",
        )


@ray.remote(num_cpus=0)
class _Owner:
    """Named after the run folder and alive as long as its driver: two never share a folder."""

    def __init__(self, who: str) -> None:
        self.who = who

    def name(self) -> str:
        return self.who


def _take_run_dir(paths: RunDir) -> Any:
    context = ray.get_runtime_context()
    who = f"job {_submission_id() or context.get_job_id()}"
    name = f"run:{paths.root}"
    # On the driver's node: on another it would be lost with that node while the job goes on.
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    while True:
        try:
            owner = _Owner.options(name=name, scheduling_strategy=here).remote(
                f"{who} on {socket.gethostname()}"
            )
            ray.get(owner.name.remote())
            return owner
        except ValueError:  # the name is taken
            with contextlib.suppress(ValueError, RayActorError):  # its job ends at this moment
                other = ray.get(ray.get_actor(name).name.remote())
                raise ClusterError(
                    f"{paths.root} is in use by {other}",
                    "a run folder of its own for every job",
                    "Wait for that job, stop it, or set another run.dir.",
                ) from None
        time.sleep(POLL_S)


def _submission_id() -> str | None:
    """What `ray job stop` takes; None when this is not a submitted job."""
    job: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")


def _run_stage(stage: Stage, config: RunConfig) -> None:
    """Runs a stage in a group of workers; what became of it is in status.json."""
    trainer = DataParallelTrainer(
        _work,
        train_loop_config={
            "stage": stage.name,
            "config_path": str(RunDir(config.run.dir).config_path),
            "submitted_from": os.getcwd(),
        },
        backend_config=_SharedGPUsConfig(),
        scaling_config=scaling_config(config.ray, stage.distributed),
        run_config=train.RunConfig(
            name=f"{stage.name}-{time.time_ns()}",
            storage_path=str(RunDir(config.run.dir).ray_dir),
            # Both caps are ours (restart.*), counted in status.json for every launcher alike.
            failure_config=FailureConfig(max_failures=config.restart.max_restarts + 1),
        ),
    )
    print(f"{stage.name}: {stage.purpose}", flush=True)
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        print(f"{stage.name}: {error}", file=sys.stderr, flush=True)


def scaling_config(section: RaySection, distributed: bool) -> ScalingConfig:
    """Workers of a stage; a range where it may go on with fewer."""
    resources = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        resources["GPU"] = section.gpus_per_worker
    num_workers: int | tuple[int, int] = section.workers if distributed else 1
    if distributed and section.min_workers is not None:
        num_workers = (section.min_workers, section.workers)
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=section.gpus_per_worker > 0,
        resources_per_worker=resources,
        placement_strategy=section.placement,
    )


def _work(job: dict[str, Any]) -> None:
    """One worker: starts its rank and waits for it. An exception makes Ray start all again."""
    context = train.get_context()
    rank = context.get_world_rank()
    config = load_config(Path(job["config_path"]))
    paths, stage = RunDir(config.run.dir), job["stage"]
    place = broadcast_from_rank_zero(_begin(paths, stage, config) if rank == 0 else None)
    if place is None:
        return  # finished before a worker was lost, or at a cap: status.json says which
    address, port, log_dir = place
    topology = Topology(
        rank, context.get_world_size(), context.get_local_rank(),
        context.get_local_world_size(), address, port,
    )  # fmt: skip
    code = _run_rank(job, topology, Path(log_dir), paths)
    outcome = _settled(paths, stage, code)
    if outcome.verdict == "restart":
        raise RuntimeError(f"rank {rank} of {stage} ended with {code}: {outcome.reason}")


def _begin(paths: RunDir, stage: str, config: RunConfig) -> tuple[str, int, str] | None:
    """(address, port, log folder) for all ranks, None when there is nothing to start: the stage had
    finished when a worker was lost, a rank failed for good, restarts have come to an end, or
    another job has the folder."""
    if attempts.judge(paths, stage).verdict == "stop":
        return None
    try:
        log_dir = attempts.begin(paths, stage, config.restart, resubmitted=True)
    except DPODistError as error:
        update_stage(
            paths.status_path, stage, "failed",
            error=str(error), exit_code=error.exit_code, restartable=False,
        )  # fmt: skip
        return None
    return None if log_dir is None else (*_rendezvous(), str(log_dir))


def _rendezvous() -> tuple[str, int]:
    """This node's address and a free port on it."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _run_rank(job: dict[str, Any], topology: Topology, log_dir: Path, paths: RunDir) -> int:
    """Runs one rank as a child process; its exit code."""
    argv = stage_argv(job["stage"], Path(job["config_path"]), job.get("overrides", ()))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = os.environ | threads | topology.environment()
    gauges = {
        name: Gauge(f"dpo_dist_{name.replace('/', '_')}", f"{name} of the last optimizer step")
        for name in SHOWN
    }
    with contextlib.ExitStack() as stack:
        output = None  # rank 0 speaks through the job's own log
        if topology.rank:
            output = stack.enter_context(rank_log_path(log_dir, topology.rank).open("ab"))
        child = subprocess.Popen(
            argv, env=environment, cwd=job["submitted_from"] if _exists(job) else None,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        warned = topology.local_rank != 0  # one rank is enough: all agree on the step to stop at
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                if not warned and _is_draining():
                    warned = True
                    child.send_signal(signal.SIGUSR2)
                if topology.rank == 0:
                    _show(gauges, read_status(paths.status_path).get("train", {}))
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode


def _is_draining() -> bool:
    """Whether Ray knows that this node goes soon: a spot instance called back, a scale-down."""
    return ray.get_runtime_context().get_node_id() in ray_state.state.get_draining_nodes()


def _exists(job: dict[str, Any]) -> bool:
    """Relative paths of a run.yaml are from where the run was submitted, if that is shared."""
    return Path(job["submitted_from"]).is_dir()


def _show(gauges: dict[str, Gauge], values: dict[str, Any]) -> None:
    for name, gauge in gauges.items():
        if name in values:
            gauge.set(values[name])


def _settled(paths: RunDir, stage: str, code: int) -> attempts.Outcome:
    """What became of the stage, once rank 0 has written it or has not for too long."""
    deadline = time.monotonic() + FINAL_STATE_S
    while code > 0 and time.monotonic() < deadline:
        if _has_ended(paths, stage):
            break
        time.sleep(POLL_S)
    outcome = attempts.judge(paths, stage)
    if outcome.verdict == "stop" and not _has_ended(paths, stage):
        # Rank 0 waits for the rank that failed: Ray ends it, and `_begin` starts nothing again.
        return dataclasses.replace(outcome, verdict="restart")
    return outcome


def _has_ended(paths: RunDir, stage: str) -> bool:
    state = read_status(paths.status_path).get("stages", {}).get(stage, {}).get("state")
    return state in ("finished", "stopped", "failed")


def _score_in_tasks(config: RunConfig) -> None:
    """Scores the missing pairs in independent tasks; one that is lost costs its own range only.

    The reference stage that follows finds the rows there, or scores what is still missing, and
    says why when it cannot.
    """
    section, count = config.ray, config.ray.reference_tasks
    score = ray.remote(_score_part).options(
        num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, max_retries=3
    )
    print(f"reference: {count} independent tasks", flush=True)
    paths = RunDir(config.run.dir)
    log_dir = attempts.new_log_dir(paths, "reference")
    common = (str(paths.root), str(log_dir), os.getcwd())
    tasks = [score.remote(f"{number}/{count}", *common) for number in range(1, count + 1)]
    for task in tasks:
        try:
            ray.get(task)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            print(f"reference: {reason}; left to the stage", file=sys.stderr, flush=True)


def _score_part(part: str, run_dir: str, log_dir: str, submitted_from: str) -> None:
    paths = RunDir(Path(run_dir))
    job = {
        "stage": "reference",
        "config_path": str(paths.config_path),
        "overrides": [f"reference.part={part}", "reference.sharding=whole"],
        "submitted_from": submitted_from,
    }
    code = _run_rank(job, Topology(0, 1, 0, 1, *_rendezvous()), Path(log_dir), paths)
    if code:
        raise RuntimeError(f"part {part} of the reference pass ended with {code}")


if __name__ == "__main__":
    main()
