"""The stages of a run on a Ray cluster, one after the other, each in a group of workers."""

import os
import sys
import time
from collections.abc import Sequence

import ray
import ray_owner
import ray_rank
import ray_reference
import ray_worker
from ray import cloudpickle, train
from ray.train import FailureConfig

# Not public: ray.train names no trainer for workers without a framework of Ray's choosing.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray_owner import take_run_dir
from ray_reference import reference_parts, score_in_tasks
from ray_resources import check_resources, scaling_config
from ray_worker import SharedGPUsConfig, work

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig
from dpo_dist.errors import EXIT_RESTART, ClusterError
from dpo_dist.run import attempts
from dpo_dist.run.lock import refuse_if_held
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.pipeline import REFERENCE, Stage
from dpo_dist.run.run_dir import RunDir

# Workers get what runs there by value: their node need not have this folder.
for _module in (ray_owner, ray_rank, ray_reference, ray_worker):
    cloudpickle.register_pickle_by_value(_module)


def run(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Runs the stages; the exit code of the run.

    Raises ClusterError when no cluster runs, when it is too small, and when another job has the
    run folder.
    """
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
    owner = take_run_dir(paths)
    # A job that Ray does not know: seen here, before anything of its folder is changed.
    attempts.patiently(lambda: refuse_if_held(paths, attempts.DYING_S))
    attempts.patiently(lambda: write_atomic(paths.config_path, to_yaml(config)))
    attempts.patiently(lambda: attempts.forget(paths))
    for stage in stages:
        if stage == REFERENCE and (parts := reference_parts(config.ray)):
            score_in_tasks(config, parts)
        _run_stage(stage, config)
        name = stage.name
        outcome = attempts.patiently(lambda name=name: attempts.judge(paths, name))
        if outcome.verdict != "next":
            print(f"{name}: {outcome.reason}", file=sys.stderr, flush=True)
            failure = attempts.patiently(lambda: attempts.first_failure(paths.latest_log_link))
            print(failure, file=sys.stderr, flush=True)
            return outcome.exit_code or EXIT_RESTART
    del owner
    return 0


def _run_stage(stage: Stage, config: RunConfig) -> None:
    """Runs a stage in a group of workers; what became of it is in status.json."""
    trainer = DataParallelTrainer(
        work,
        train_loop_config={
            "stage": stage.name,
            "config_path": str(RunDir(config.run.dir).config_path),
            "submitted_from": os.getcwd(),
        },
        backend_config=SharedGPUsConfig(),
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
