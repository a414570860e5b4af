"""One rank as a child process of a Ray worker, and gone with it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray

# Not public: nothing else tells, without waiting for the other workers, of a node to be drained.
from ray._private import state as ray_state
from ray.util.metrics import Gauge

from dpo_dist.run.attempts import note_death
from dpo_dist.run.local_ranks import die_with_parent
from dpo_dist.run.pipeline import stage_argv
from dpo_dist.run.run_dir import RunDir, rank_log_path
from dpo_dist.run.status import read_status
from dpo_dist.run.topology import Topology

POLL_S = 1.0
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "pairs_per_second", "step")


def rendezvous() -> tuple[str, int]:
    """This node's address and a free port on it."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def run_rank(job: dict[str, Any], topology: Topology, log_dir: Path, paths: RunDir) -> int:
    """Runs one rank and waits for it; its exit code, negative when a signal killed it.

    `job` names the `stage`, its `config_path` and `overrides`, and the folder it was
    `submitted_from`. When Ray drains the node, the rank is told to save and leave.
    """
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
    if child.returncode < 0:
        died = note_death(log_dir, topology.rank, child.returncode)
        print(f"rank {topology.rank} was {died}", file=sys.stderr, flush=True)
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
