"""Run all stages on a Ray cluster.

    ray job submit --working-dir . -- python launch/ray_launcher.py run.yaml [section.key=value ...]
    python launch/ray_launcher.py run.yaml ...        on a node of a running cluster

Every rank is a process of its own, started by a Ray Train worker with the argv and environment of
any other launcher, and gone with it. When a worker or a node is lost, Ray starts the group again
and the run goes on from its own newest checkpoint. Exits with the code of the stage that failed.
DPO_STAGES="train export" in the environment runs these stages only.
"""

import os

import typer
from command_line import ConfigPath, Overrides, start

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ClusterError
from dpo_dist.extras import import_fault
from dpo_dist.run.pipeline import DOCTOR, stages_of, submitted_stage

# Ray reads these when it is imported.
RAY_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # Ray would install a package environment of its own on the workers.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # `is_draining` is ours: Ray Train's is a barrier of all workers, which end at different times.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def main(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Run all stages on a Ray cluster, from one of its nodes or under `ray job submit`.

    DPO_STAGES="train export" in the environment runs these stages only.
    """
    config = load_config(config_path, overrides or [])
    chosen = [submitted_stage(name) for name in os.environ.get("DPO_STAGES", "").split()]
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from ray_run import run
    except ImportError as error:
        fault, remedy = import_fault("ray", "ray", error)
        raise ClusterError(f"ray {fault}", "the extra `ray`", remedy) from None

    stages = [stage for stage in (DOCTOR, *stages_of(config)) if not chosen or stage in chosen]
    raise typer.Exit(run(config, stages))


if __name__ == "__main__":
    start(main)
