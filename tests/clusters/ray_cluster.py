"""A real Ray cluster on this machine: a head and two more nodes, each a tree of processes.

    with ray_cluster(folder) as cluster:
        job = cluster.submit(run_yaml)      # `ray job submit`
        cluster.stop_node(2)                # what `ray stop` does on that machine

Node 2 has a network of its own behind a veth pair, so that nothing can rely on loopback. Token
authentication is on, the dashboard listens on loopback only. Wants root.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.ranks import ROOT, free_port, wait_until

RAY = Path(sys.executable).parent / "ray"
UP = ROOT / "launch" / "ray_up.sh"
LAUNCHER = ROOT / "launch" / "ray_launcher.py"
LINK, HEAD_IP, FAR_IP = "dpo1", "10.98.8.1", "10.98.8.2"
NUM_CPUS = (0, 2, 1, 2)  # of each node: two spread ranks must be in two networks, not on the head
START_S = 90
STOP_S = 20


@dataclass
class RayCluster:
    """The running nodes; node 0 is the head."""

    folder: Path
    environment: dict[str, str]
    port: int
    dashboard_port: int
    namespace: str
    sessions: Path  # what Ray writes
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_node(self) -> None:
        """Starts one node more and waits until it is there."""
        before = self.num_alive()
        far = len(self.nodes) == 2
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}"] if far else []
        token = self.environment["RAY_AUTH_TOKEN_PATH"]
        place = ["node", token, f"{HEAD_IP}:{self.port}"]
        if not self.nodes:
            place = [
                "head",
                token,
                f"--port={self.port}",
                f"--dashboard-port={self.dashboard_port}",
            ]
        command = [
            *inside, str(UP), *place, f"--node-ip-address={FAR_IP if far else HEAD_IP}",
            f"--num-cpus={NUM_CPUS[len(self.nodes)]}", "--num-gpus=0",
            "--object-store-memory=100000000", "--block",
        ]  # fmt: skip
        with (self.folder / f"node{len(self.nodes)}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )
        wait_until(lambda: self.num_alive() == before + 1, START_S)

    def stop_node(self, number: int) -> None:
        """Ends all processes of one node."""
        node = self.nodes[number]
        node.send_signal(signal.SIGTERM)  # --block then stops what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait(STOP_S)

    def drain_node(self, node_id: str) -> None:
        """What a cloud does that wants a node back."""
        subprocess.run(
            [
                RAY, "drain-node", f"--address={HEAD_IP}:{self.port}", f"--node-id={node_id}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=expected back",
                "--deadline-remaining-seconds=120",
            ],
            env=self.environment, check=True, timeout=200,
        )  # fmt: skip

    def num_alive(self) -> int:
        return len([node for node in self.listed("nodes") if node["state"] == "ALIVE"])

    def nodes_of(self, class_name: str) -> set[tuple[str, bool]]:
        """(id, whether it is the head) of the nodes that have living actors of a class."""
        is_head = {node["node_id"]: node["is_head_node"] for node in self.listed("nodes")}
        return {
            (actor["node_id"], is_head[actor["node_id"]])
            for actor in self.listed("actors")
            if actor["class_name"] == class_name and actor["state"] == "ALIVE"
        }

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """What `ray list` shows, empty while the dashboard starts."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"])
        with contextlib.suppress(OSError):
            request = urllib.request.Request(
                f"{self.dashboard}/api/v0/{kind}",
                headers={"Authorization": f"Bearer {token.read_text()}"},
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)["data"]["result"]["result"]
        return []

    def metrics(self) -> str:
        """What Prometheus, and with it the dashboard, would read from all nodes."""
        # twice: in the session's folder and through the link to it
        discovery = next(self.sessions.glob("**/prom_metrics_service_discovery.json"))
        said = ""
        for target in json.loads(discovery.read_text())[0]["targets"]:
            with contextlib.suppress(OSError):
                said += urllib.request.urlopen(f"http://{target}", timeout=5).read().decode()
        return said

    def submit(self, *arguments: str | Path, stages: str = "") -> subprocess.Popen[str]:
        """`ray job submit` of the launcher; its exit code is 0 when the job's is."""
        variables = {"env_vars": {"DPO_STAGES": stages}}
        command = [
            str(RAY), "job", "submit", f"--address={self.dashboard}",
            f"--runtime-env-json={json.dumps(variables)}",
            "--", sys.executable, str(LAUNCHER), *map(str, arguments),
        ]  # fmt: skip
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def ray_cluster(folder: Path, num_nodes: int = 3) -> Iterator[RayCluster]:
    """Starts the nodes and waits until all are there; stops them at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    # a short name: the paths of Ray's sockets must fit 107 bytes
    sessions = Path(f"/tmp/ray-{os.getpid()}")
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(sessions),
        "RAY_DEDUP_LOGS": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # how long a lost node is waited for
        "RAY_raylet_start_wait_time_s": "60",  # two cores start three nodes
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a node that is lost gives no notice
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "1000",
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }
    namespace = f"dpo-dist-ray-{os.getpid()}"
    cluster = RayCluster(folder, environment, free_port(), free_port(), namespace, sessions)
    try:
        # left by a test run that was killed
        subprocess.run(["ip", "link", "del", LINK], check=False, capture_output=True, timeout=20)
        _ip("netns", "add", namespace)
        _ip("link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", namespace)
        for inside, address in (((), HEAD_IP), (("-n", namespace), FAR_IP)):
            _ip(*inside, "addr", "add", f"{address}/24", "dev", LINK)
            _ip(*inside, "link", "set", LINK, "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        for _ in range(num_nodes):
            cluster.start_node()
        yield cluster
    finally:
        for number in reversed(range(len(cluster.nodes))):
            cluster.stop_node(number)
        for command in (["ip", "link", "del", LINK], ["ip", "netns", "del", namespace]):
            subprocess.run(command, check=False, timeout=20)
        shutil.rmtree(sessions, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)
