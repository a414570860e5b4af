"""The run on a real Ray cluster of three nodes, one of them in a network of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_runs import (
    LAST_STEP,
    LONG,
    SOAK,
    SOAK_FAULTS,
    scored_copy,
    soak,
    status_of,
    step_of,
)
from ray_cluster import RAY, RayCluster, ray_cluster
from support.commands import succeed
from support.ranks import wait_until
from support.tiny_run import metrics_of, same_training

from dpo_dist.run.attempts import died_of

WORKERS = ("ray.workers=2", "ray.gpus_per_worker=0")
JOB_S = 900  # a busy machine takes three times what a quiet one does

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not RAY.exists(),
        reason="wants root, iproute2 and ray",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


def processes(expected: Callable[[list[bytes], set[bytes]], bool]) -> list[int]:
    """Processes by their arguments and environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            environ = set((entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if entry.name.isdigit() and expected(arguments, environ):
            found.append(int(entry.name))
    return found


def rank_pids(run_dir: Path, rank: int) -> list[int]:
    """The stage process of one rank of a run."""
    mine = str(run_dir / "config.resolved.yaml").encode()
    return processes(
        lambda arguments, environ: (
            b"dpo_dist" in arguments and mine in arguments and f"RANK={rank}".encode() in environ
        )
    )


def worker_pid(pid: int) -> int:
    """The Ray worker that started a rank."""
    fields = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[1])


@pytest.mark.slow
def test_a_sweep_is_a_job_a_point(cluster: RayCluster, local: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "-m", "dpo_dist", "sweep", local / "run.yaml", "objective.beta=0.1,0.5",
            f"run.dir={out}", *WORKERS, "train.max_steps=3", "--ray", "--train-only",
        ],
        env=cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
        cwd=tmp_path, capture_output=True, text=True, timeout=JOB_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    result = json.loads((out / "sweep" / "results.json").read_text())
    assert [(row["state"], row["step"]) for row in result["points"]] == [("done", 3)] * 2
    (inputs,) = (out / "sweep").glob("inputs-*")
    assert len(list((inputs / "logs").glob("reference-*"))) == 1


def ended(job: subprocess.Popen[str], run_dir: Path) -> str:
    """The output of a job, which has to end well."""
    output, _ = job.communicate(timeout=JOB_S)
    assert job.returncode == 0, f"{output}\n{status_of(run_dir)}"
    return output


@pytest.mark.fault(
    9,
    "SIGKILL of a Ray worker in the reference pass and in training",
    becomes="restarted; the numbers of a local run",
)
@pytest.mark.parametrize(
    ("stages", "killed"),
    [
        ("reference train", {"train": 0}),
        pytest.param("", {"reference": 1, "train": 0}, marks=pytest.mark.slow),
    ],
    ids=["two stages", "all stages"],
)
def test_workers_killed_on_the_way_leave_the_local_numbers(
    cluster: RayCluster, local: Path, tmp_path: Path, stages: str, killed: dict[str, int]
) -> None:
    out = tmp_path / "out"
    if stages:
        shutil.copytree(local / "out" / "pairs", out / "pairs")
    job = cluster.submit(
        local / "run.yaml", f"run.dir={out}", *WORKERS, "ray.placement=STRICT_SPREAD",
        stages=stages,
    )  # fmt: skip
    for stage, rank in killed.items():
        wait_until(
            lambda stage=stage: (
                (s := status_of(out)).get("stage") == stage and s.get("state") == "running"
            ),
            JOB_S,
        )
        pids = rank_pids(out, rank)
        assert len(pids) == 1
        os.kill(worker_pid(pids[0]), signal.SIGKILL)  # its rank dies with it
        wait_until(lambda pid=pids[0]: not (Path("/proc") / str(pid)).exists(), 10)
    output = ended(job, out)
    ours, theirs = metrics_of(out), metrics_of(local / "out")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-5, abs=1e-5)
    status = status_of(out)
    assert status["restarts"]["total"] == len(killed)
    expected = stages.split() or ["doctor", "prepare", "reference", "train", "export", "verify"]
    assert {n: s["state"] for n, s in status["stages"].items()} == dict.fromkeys(
        expected, "finished"
    )
    assert "step 10/10 train: loss" in output  # progress reaches the job's log
    if not stages:
        assert json.loads((out / "verify.json").read_text())["passed"]
        ranks = json.loads((out / "doctor.json").read_text())["ranks"]
        assert len({rank["address"] for rank in ranks}) == 2, "two ranks in two networks"


@pytest.mark.fault(
    9,
    "16 GPUs asked of a cluster with none",
    becomes="an error before anything starts",
)
def test_more_than_the_cluster_has_is_refused_before_anything_starts(
    cluster: RayCluster, local: Path, tmp_path: Path
) -> None:
    """Ray itself would wait for ever."""
    job = cluster.submit(local / "run.yaml", f"run.dir={tmp_path}", "ray.workers=16")
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 1 and not list(tmp_path.iterdir())
    assert "error: the cluster has room for 0 workers of 1 GPUs and 1 CPUs (" in output
    assert "expected room for 16. Lower ray.workers, ray.gpus_per_worker" in output


@pytest.mark.fault(
    9,
    "SIGKILL of one of three reference tasks",
    becomes="its range alone is left to the stage",
)
@pytest.mark.slow
def test_the_reference_in_independent_tasks(
    cluster: RayCluster, local: Path, tmp_path: Path
) -> None:
    """One of three dies: its range, and no other, is left to the stage."""
    out = tmp_path / "out"
    shutil.copytree(local / "out" / "pairs", out / "pairs")
    job = cluster.submit(
        local / "run.yaml", f"run.dir={out}", *WORKERS, "ray.reference_tasks=3", stages="reference"
    )
    first = {str(out / "config.resolved.yaml").encode(), b"reference.part=1/3"}
    wait_until(lambda: bool(processes(lambda arguments, _: first <= set(arguments))), 120)
    os.kill(processes(lambda arguments, _: first <= set(arguments))[0], signal.SIGKILL)
    output = ended(job, out)
    assert "reference: 3 independent tasks" in output
    assert f"of the reference pass was {died_of(signal.SIGKILL)}; left to the stage" in output
    report = json.loads((out / "reference.json").read_text())
    assert report["num_scored_now"] == 14 + 4  # every third of 40 and of 10 pairs
    logs = {path.name for path in (out / "logs" / "reference-01").iterdir()}
    # the one that was killed may not have begun its own
    assert logs - {"rank0001.log"} == {"rank0002.log", "rank0003.log"}
    succeed("train", local / "run.yaml", f"run.dir={out}")
    # other neighbors in a micro-batch move the last bits of a reference log-prob
    for our, their in zip(metrics_of(out), metrics_of(local / "out"), strict=True):
        assert our == pytest.approx(their, rel=1e-4, abs=1e-4)


@pytest.mark.fault(
    30,
    "the dashboard asked without its token",
    becomes="401; the token's file is 0600 and in no argv",
)
def test_without_the_token_nobody_gets_in(cluster: RayCluster) -> None:
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    url = f"{cluster.dashboard}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=10)
    assert refused.value.code == 401
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token.read_text()}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    secret = token.read_text().encode()
    assert not processes(lambda arguments, _: any(secret in part for part in arguments))


@pytest.mark.fault(
    9,
    "a node stopped, the driver killed, the job submitted again under its name",
    becomes="fewer workers, then the resubmitted job; the curve of an unbroken run",
)
@pytest.mark.fault(
    19,
    "a second Ray job in the run folder",
    becomes="refused with the job of the first",
)
@pytest.mark.slow
def test_a_lost_node_and_a_killed_driver_leave_fewer_workers_and_the_same_curve(
    cluster: RayCluster, local: Path, unbroken: Path, tmp_path: Path
) -> None:
    """The job is submitted again under the same name, and goes on where the first one was."""
    out = scored_copy(local, tmp_path / "out")
    arguments = (local / "run.yaml", *LONG, f"run.dir={out}", "ray.gpus_per_worker=0")
    elastic = ("ray.workers=3", "ray.min_workers=1", "ray.placement=SPREAD")
    job = cluster.submit(*arguments, *elastic, stages="train")
    wait_until(lambda: step_of(out) >= 10, 120)
    wait_until(lambda: "ray_dpo_dist_loss{" in cluster.metrics(), 15)  # what the dashboard shows
    wait_until(lambda: step_of(out) >= 30, 30)
    ((_, is_head),) = cluster.nodes_of("_Owner")
    assert is_head, "a run's owner goes with its driver, with no other node"
    cluster.stop_node(2)

    second = cluster.submit(*arguments, *elastic, stages="train")
    refused, _ = second.communicate(timeout=200)
    assert second.returncode == 1
    assert f"error: {out} is in use by job raysubmit_" in refused
    assert "Wait for that job, stop it, or set another run.dir." in refused
    wait_until(lambda: newest_world_size(out) == 2, 120)
    mine = f"run.dir={out}".encode()
    for pid in processes(
        lambda a, e: mine in a and any(part.endswith(b"ray_launcher.py") for part in a[:2])
    ):
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=200)
    assert job.returncode == 1
    wait_until(lambda: not any(rank_pids(out, rank) for rank in range(3)), 60)
    assert step_of(out) < LAST_STEP
    ended(cluster.submit(*arguments, "ray.workers=2", stages="train"), out)

    ours, theirs = metrics_of(out), metrics_of(unbroken)
    for name in ("step", "consumed_pairs"):
        assert [line.get(name) for line in ours] == [line.get(name) for line in theirs]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.fault(9, "a node drained", becomes="left after a checkpoint, no step is done twice")
@pytest.mark.slow
def test_a_node_that_is_drained_is_left_without_a_step_done_twice(
    cluster: RayCluster, local: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = scored_copy(local, tmp_path / "out")
    cluster.start_node()  # the workers have room on one node, and another one is to spare
    job = cluster.submit(
        local / "run.yaml", *LONG, f"run.dir={out}", *WORKERS, "ray.placement=STRICT_PACK",
        stages="train",
    )  # fmt: skip
    wait_until(lambda: step_of(out) >= 30, 120)
    ((node_id, _),) = cluster.nodes_of("RayTrainWorker")
    cluster.drain_node(node_id)
    output = ended(job, out)
    assert "training stopped after step " in output
    steps = [line["step"] for line in metrics_of(out)]
    assert steps == [line["step"] for line in metrics_of(unbroken)]
    logged, again = (
        re.findall(rf"step (\d+)/{LAST_STEP} train: ", path.read_text())
        for path in sorted(out.glob("logs/train-*/rank0000.log"))
    )
    assert int(again[0]) == int(logged[-1]) + 1 > 31
    assert metrics_of(out) == metrics_of(unbroken)


@pytest.mark.fault(
    9,
    "on Ray: ten of SIGKILL of a worker or a rank and SIGSTOP of a rank, decided by a seed",
    becomes="the group starts again; metrics and weights equal an unbroken run",
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak_on_ray(cluster: RayCluster, local: Path, unbroken: Path, tmp_path: Path) -> None:
    out = scored_copy(local, tmp_path / "out")
    job = cluster.submit(
        local / "run.yaml", *LONG, *SOAK, f"run.dir={out}", *WORKERS, stages="train"
    )

    def kill_worker() -> None:
        os.kill(worker_pid(rank_pids(out, 1)[0]), signal.SIGKILL)

    def kill_rank() -> None:
        os.kill(rank_pids(out, 0)[0], signal.SIGKILL)

    def stop_rank() -> None:
        os.kill(rank_pids(out, 1)[0], signal.SIGSTOP)

    soak(out, 1, (kill_worker, kill_rank, stop_rank))
    ended(job, out)
    assert status_of(out)["restarts"]["total"] == SOAK_FAULTS
    same_training(unbroken, out, LAST_STEP)


def newest_world_size(run_dir: Path) -> int:
    """Of the newest checkpoint, 0 when there is none."""
    states = sorted((run_dir / "checkpoints").glob("step-*/train_state.json"))
    return json.loads(states[-1].read_text())["world_size"] if states else 0
