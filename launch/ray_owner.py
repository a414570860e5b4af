"""Who works in a run folder: a named actor for every job, so that two never share one."""

import contextlib
import json
import os
import socket
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_dist.errors import ClusterError
from dpo_dist.run.run_dir import RunDir

POLL_S = 1.0


@ray.remote(num_cpus=0)
class _Owner:
    """Named after the run folder and alive as long as its driver."""

    def __init__(self, who: str) -> None:
        self.who = who

    def name(self) -> str:
        return self.who


def take_run_dir(paths: RunDir) -> Any:
    """The owner, to be held until the run ends.

    Raises ClusterError, naming the other job, when the folder has one.
    """
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
    # Not public: the runtime context tells the driver's own id only, which `ray job` does not know.
    job: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")
