"""The run on a real Slurm cluster of two nodes, each in a network of its own."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
from support.ranks import ROOT, wait_until
from support.tiny_run import metrics_of, same_training
from support.wheel import HIDDEN, build_wheel, install_wheel

SCRIPT = Path(__file__).parent / "slurm.sh"
DPO = ROOT / "slurm" / "dpo.sh"
LAUNCHER = ROOT / "launch" / "slurm_launcher.py"
SIZE = (
    "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10",
)  # fmt: skip
JOB_S = 600  # a busy machine takes three times what a quiet one does
HURRY_S = 5

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("slurmctld") or not shutil.which("munged"),
        reason="wants root, slurm-wlm and munge (apt-get install slurm-wlm munge iproute2)",
    ),
]


class Slurm:
    """Slurm's own commands on the test's cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blind = folder / "blind"  # seen by nodea only
        search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment = inherited | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": search,
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "1000",
            "SLURM_EXPORT_ENV": "NONE",  # as some sites have it: srun would hand on nothing
        }

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=cwd, capture_output=True, text=True,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, cwd: Path, *arguments: str, stages: str = "") -> str:
        """Submits dpo.sh from `cwd`; the job's id."""
        export = f"--export=ALL,DPO_STAGES={stages}" if stages else "--export=ALL"
        return self.call("sbatch", "--parsable", export, *SIZE, DPO, *arguments, cwd=cwd)

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.call("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in text.split(" ") if "=" in field)

    def wait(self, job_id: str, *states: str, restarts: int = 0) -> dict[str, str]:
        """Waits until the job is in one of the states, after so many restarts at least. A requeued
        job is hurried on: Slurm would hold it back for two minutes, and needs a few seconds to get
        over the last attempt."""
        deadline, hurried = time.monotonic() + JOB_S, None
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - set(states)
        while True:
            job = self.job(job_id)
            if job["JobState"] in states and int(job["Restarts"]) >= restarts:
                return job
            assert job["JobState"] not in ended, job
            waits = job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"
            if waits and hurried != job["Restarts"]:
                start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + HURRY_S))
                self.call("scontrol", "update", f"JobId={job_id}", f"StartTime={start}")
                hurried = job["Restarts"]
            assert time.monotonic() < deadline, job
            time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "up", folder], check=True, timeout=200)
    try:
        yield Slurm(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=200)


def rank_pids(job_id: str, rank: int) -> list[int]:
    """Processes of one rank's stage."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = {f"SLURM_JOB_ID={job_id}".encode(), f"RANK={rank}".encode()} <= set(environ)
        if mine and b"dpo_dist" in arguments:
            found.append(int(entry.name))
    return found


@pytest.mark.fault(
    8,
    "`scontrol requeue` of a job that has finished",
    becomes="exits 0, no stage runs again",
)
@pytest.mark.fault(30, "a folder named `a run; with $(spaces)`", becomes="all stages run in it")
def test_all_stages_in_one_allocation_give_the_local_numbers(
    slurm: Slurm, local: Path, tmp_path: Path
) -> None:
    """Names with spaces, and a folder that holds files which a node list would match."""
    folder = tmp_path / "a run; with $(spaces)"
    shutil.copytree(local, folder, ignore=shutil.ignore_patterns("out", "unbroken"))
    for name in ("nodea", "nodeb", "node[a-b]"):
        (folder / name).write_text("not a node")
    job_id = slurm.submit(folder, "run.yaml", f"run.dir={folder / 'my out'}")
    slurm.wait(job_id, "COMPLETED")
    out = folder / "my out"
    ours, theirs = metrics_of(out), metrics_of(local / "out")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-5, abs=1e-5)
    assert json.loads((out / "verify.json").read_text())["passed"]
    doctor = json.loads((out / "doctor.json").read_text())
    assert [rank["node"] for rank in doctor["ranks"]] == ["nodea", "nodeb"]
    logs = {path.relative_to(out / "logs").as_posix() for path in (out / "logs").glob("*/*.log")}
    assert {"train-01/rank0000.log", "train-01/rank0001.log"} <= logs
    assert (out / "logs" / "latest").resolve().name == "verify-01"
    log = (folder / f"dpo-{job_id}.log").read_text()
    assert "step 10/10 train: loss" in log and "Traceback" not in log

    # A finished job that is put back into the queue does nothing and ends well.
    slurm.call("scontrol", "requeue", job_id)
    job = slurm.wait(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert {path.name for path in (out / "logs").glob("*-02")} == set()


def usr2(slurm: Slurm, job_id: str) -> None:
    # as --signal=B:USR2 does before a preemption: to the batch shell and nobody else
    slurm.call("scancel", "--batch", "--signal=USR2", job_id)


def cancel_step(slurm: Slurm, job_id: str) -> None:
    steps = slurm.call("squeue", "--steps", "--noheader", "--format=%i", "--jobs", job_id).split()
    (step,) = (name for name in steps if name.split(".")[1].isdigit())  # not .batch
    slurm.call("scancel", "--signal=KILL", step)


def kill_rank(_: Slurm, job_id: str) -> None:
    for pid in rank_pids(job_id, 1):
        os.kill(pid, signal.SIGKILL)


Stop = Callable[[Slurm, str], None]


@pytest.mark.fault(
    1,
    "on Slurm: USR2 to the batch shell, SIGKILL of rank 1, the step canceled, at random steps",
    becomes="requeued once, then started again where it is; numbers equal an unbroken run",
)
@pytest.mark.parametrize(
    "ways",
    [(usr2, kill_rank), pytest.param((usr2, kill_rank, cancel_step), marks=pytest.mark.slow)],
    ids=["twice", "three times"],
)
def test_a_job_stopped_in_several_ways_goes_on_and_ends_like_an_unbroken_one(
    slurm: Slurm, local: Path, unbroken: Path, tmp_path: Path, ways: tuple[Stop, ...]
) -> None:
    out = scored_copy(local, tmp_path / "out")
    job_id = slurm.submit(
        tmp_path, str(local / "run.yaml"), *LONG, f"run.dir={out}", stages="train"
    )
    log = tmp_path / f"dpo-{job_id}.log"
    for number, stop in enumerate(ways):
        at = 45 * number + random.randrange(10, 40)
        wait_until(lambda at=at: step_of(out) >= at, 120)
        stop(slurm, job_id)
        print(f"{stop.__name__} after step {at}")
        # only what is told to stop leaves its allocation; the steps of a job are numbered
        slurm.wait(job_id, "RUNNING", "COMPLETED", restarts=1)
        begun = out / "logs" / f"train-{number + 2:02d}"
        wait_until(begun.exists, 120)
        if stop is usr2:
            assert "training stopped after step" in log.read_text()
        if stop is kill_rank:  # test_truth_07: the signal is told by the rank's own task
            assert "train: rank 1: killed by signal 9, often out of memory" in log.read_text()
    job = slurm.wait(job_id, "COMPLETED")
    assert int(job["Restarts"]) == 1
    status = status_of(out)
    assert status["restarts"]["total"] == len(ways) and status["train"]["step"] == LAST_STEP
    assert log.read_text().count(f"dpo.sh: job {job_id} goes back into the queue at train") == 1
    assert log.read_text().count(f"dpo.sh: train starts again in job {job_id}") == len(ways) - 1
    same_training(unbroken, out, LAST_STEP)


@pytest.mark.fault(
    1,
    "on Slurm: ten of USR2, SIGKILL or SIGSTOP of a rank, the step canceled, decided by a seed",
    becomes="requeued or started again; metrics and weights equal an unbroken run",
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak_on_slurm(slurm: Slurm, local: Path, unbroken: Path, tmp_path: Path) -> None:
    out = scored_copy(local, tmp_path / "out")
    job_id = slurm.submit(
        tmp_path, str(local / "run.yaml"), *LONG, *SOAK, f"run.dir={out}", stages="train"
    )
    requeued = 0

    def preempt() -> None:
        nonlocal requeued
        usr2(slurm, job_id)
        requeued += 1
        slurm.wait(job_id, "RUNNING", restarts=requeued)

    def cancel() -> None:
        cancel_step(slurm, job_id)

    def kill() -> None:
        kill_rank(slurm, job_id)

    def stop() -> None:
        for pid in rank_pids(job_id, 0):
            os.kill(pid, signal.SIGSTOP)

    soak(out, 1, (preempt, cancel, kill, stop))
    slurm.wait(job_id, "COMPLETED")
    assert status_of(out)["restarts"]["total"] == SOAK_FAULTS
    same_training(unbroken, out, LAST_STEP)


def test_a_chain_ends_at_the_stage_that_fails(slurm: Slurm, local: Path, tmp_path: Path) -> None:
    out = scored_copy(local, tmp_path / "out")
    overrides = [
        f"run.dir={out}", "train.micro_batch_tokens=8", "slurm.nodes=2", "slurm.tasks_per_node=1",
        "slurm.cpus_per_task=1", "slurm.gpus_per_node=0", "slurm.time='10'",
        "slurm.stages.train.options=[--comment=mine]",
    ]  # fmt: skip
    said = slurm.call(sys.executable, LAUNCHER, local / "run.yaml", *overrides, cwd=tmp_path)
    job_ids = dict(line.split(" job ") for line in said.splitlines())
    ids = {name.strip(): job_id for name, job_id in job_ids.items()}
    assert list(ids) == ["doctor", "prepare", "reference", "train", "export", "verify"]
    assert slurm.job(ids["train"])["Comment"] == "mine"
    assert slurm.job(ids["export"])["NumNodes"].startswith("1")
    failed = slurm.wait(ids["prepare"], "FAILED")
    assert failed["ExitCode"] == "2:0"
    for name in ("reference", "train", "export", "verify"):
        assert slurm.wait(ids[name], "CANCELLED")["Restarts"] == "0"
    assert slurm.job(ids["doctor"])["JobState"] == "COMPLETED"
    log = (tmp_path / f"out-prepare-{ids['prepare']}.log").read_text()
    assert "expected at most micro_batch_tokens = 8" in log and "Traceback" not in log
    assert not (out / "export").exists()


@pytest.mark.fault(11, "a Slurm node without the run folder", becomes="named by `doctor`, exit 2")
@pytest.mark.slow
def test_a_node_that_does_not_see_the_run_folder_is_named(
    slurm: Slurm, local: Path, tmp_path: Path
) -> None:
    """Slow: a node has two minutes to give a sign of life."""
    out = slurm.blind / "out"
    job_id = slurm.submit(tmp_path, str(local / "run.yaml"), f"run.dir={out}")
    job = slurm.wait(job_id, "FAILED")
    assert job["ExitCode"] == "2:0"
    log = (tmp_path / f"dpo-{job_id}.log").read_text()
    assert "error: ranks 1 on nodeb wrote nothing into the run folder; expected a sign of" in log
    assert "leave it out (--exclude=nodeb)." in log
    assert not (out / "pairs").exists()


def of_a_wheel(slurm: Slurm, folder: Path) -> Slurm:
    """The same cluster for a user who has installed the wheel, and has a site.env of his own."""
    installed = install_wheel(build_wheel(folder), folder / "venv")
    site = folder / "our site.env"
    site.write_text((ROOT / "slurm" / "site.env").read_text() + "echo this is our site\n")
    user = Slurm(slurm.folder)
    kept = {name: value for name, value in user.environment.items() if name not in HIDDEN}
    search = f"{installed}:{kept['PATH']}"
    user.environment = kept | {"PATH": search, "DPO_DIST_SITE": str(site)}
    return user


@pytest.mark.slow
def test_a_sweep_is_an_array_whose_elements_stop_one_by_one(
    slurm: Slurm, local: Path, tmp_path: Path
) -> None:
    """One point is told to stop: it alone goes back into the queue, and both end done."""
    out = tmp_path / "out"
    user = of_a_wheel(slurm, tmp_path)
    command = [
        tmp_path / "venv/bin/dpo-dist", "sweep", local / "run.yaml", "objective.beta=0.1,0.5",
        f"run.dir={out}", *LONG, "slurm.nodes=2", "slurm.tasks_per_node=1", "slurm.cpus_per_task=1",
        "slurm.gpus_per_node=0", "slurm.time='10'", "--slurm", "--train-only",
    ]  # fmt: skip
    said = user.call(*command, cwd=tmp_path)
    ids = {line.split()[0]: line.split()[2] for line in said.splitlines()}
    assert list(ids) == ["inputs", "points", "table"]
    again = subprocess.run(
        command, env=user.environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 2
    assert "jobs of this sweep are in the queue (" in again.stderr
    assert (
        "expected one submission of a sweep at a time. Wait for them, or `scancel" in again.stderr
    )
    points = [out / "sweep" / f"beta={beta}" for beta in ("0.1", "0.5")]
    wait_until(lambda: all(step_of(point) >= 10 for point in points), JOB_S)
    # the element that has the array's own id: by that id both would be reached
    listed = slurm.call("squeue", "--noheader", "--array", "--format=%i %A", "--states=RUNNING")
    element = next(line.split()[0] for line in listed.splitlines() if ids["points"] in line.split())
    slurm.call("scancel", "--batch", "--signal=USR2", element)
    slurm.wait(element, "COMPLETED")
    slurm.wait(ids["table"], "COMPLETED")
    restarts = sorted(status_of(point)["restarts"]["total"] for point in points)
    assert restarts == [0, 1]
    result = json.loads((out / "sweep" / "results.json").read_text())
    assert [row["state"] for row in result["points"]] == ["done", "done"]
    assert [row["step"] for row in result["points"]] == [LAST_STEP] * 2
    assert (out / "sweep" / "results.png").exists()
    (inputs,) = (out / "sweep").glob("inputs-*")
    assert len(list((inputs / "logs").glob("reference-*"))) == 1
    logs = list(tmp_path.glob("*.log"))
    assert len(logs) == 4 and all("this is our site" in log.read_text() for log in logs)
    assert not list(out.glob("sweep/beta=*/logs/reference-*"))


def test_sbatch_that_refuses_cancels_what_was_submitted(
    slurm: Slurm, local: Path, tmp_path: Path
) -> None:
    overrides = [
        f"run.dir={tmp_path}",
        "slurm.gpus_per_node=0",
        "slurm.stages.train.partition=nowhere",
    ]
    done = subprocess.run(
        [sys.executable, LAUNCHER, local / "run.yaml", *overrides],
        env=slurm.environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch refuses train (exit 1: sbatch: error: ")
    assert done.stderr.strip().endswith(
        "expected a job that the cluster takes. Correct slurm or slurm.stages.train; nothing "
        "of this "
        "chain runs."
    )
    wait_until(lambda: slurm.call("squeue", "--noheader") == "", 30)


def test_a_dry_run_submits_nothing(slurm: Slurm, local: Path, tmp_path: Path) -> None:
    said = slurm.call(
        sys.executable, LAUNCHER, local / "run.yaml", "--dry-run", "slurm.stages.train.nodes=9"
    )
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["sbatch"] * 6
    assert "--dependency=afterok:ID_OF_REFERENCE" in lines[3] and "--nodes=9" in lines[3]
    assert "#SBATCH --signal=B:USR2@300" in lines
    assert slurm.call("squeue", "--noheader") == ""
