"""One job at a time in a run folder; without flock: tests/faults/test_leases.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import dpo_dist
from support.faults.other_user import files_of_another_user, needs_root
from support.ranks import wait_until
from support.tiny_run import make_run

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.errors import ArtifactError
from dpo_dist.run import attempts
from dpo_dist.run import lock as run_lock
from dpo_dist.run.run_dir import RunDir

HOLDER = """
import sys, time
from pathlib import Path
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.lock import held
with held(RunDir(Path(sys.argv[1])), "train"):
    print("held", flush=True)
    time.sleep(60)
"""
CAPS = RestartSection()  # pyright: ignore[reportCallIssue]


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "77"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault(
    19,
    "a second command in the folder of a running job",
    becomes="refused with host, process and job of the first; changes nothing",
)
def test_a_second_job_is_refused_and_changes_nothing(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    run_yaml = make_run(tmp_path)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    refused = dpo_dist("prepare", run_yaml)
    assert refused.returncode == 2
    said = " ".join((refused.stdout + refused.stderr).split())
    assert f"out is in use (job 77, train, process {holder.pid} on " in said
    assert "Wait for it, stop it, or set another run.dir." in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.fault(19, "SIGKILL of the lock's owner", becomes="taken over")
def test_the_lock_is_gone_with_its_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    paths = RunDir(tmp_path / "out")
    with pytest.raises(ArtifactError, match="in use"), run_lock.held(paths, "train", wait_s=0):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    wait_until(lambda: holder.poll() is not None, 10)
    with run_lock.held(paths, "export", wait_s=0):
        pass
    assert attempts.begin(paths, "train", CAPS, resubmitted=False)


@pytest.mark.fault(19, "a predecessor that ends a second later", becomes="waited for")
def test_a_dying_predecessor_is_given_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with run_lock.held(RunDir(tmp_path / "out"), "train", wait_s=20):
        pass
    killer.wait()


@needs_root
def test_truth_06_a_run_folder_of_another_user_is_an_error_with_the_remedy() -> None:
    with files_of_another_user() as folder:
        paths = RunDir(folder)
        paths.lock_path.touch(mode=0o444)
        with pytest.raises(ArtifactError) as caught:
            attempts.begin(paths, "train", CAPS, resubmitted=True)
    assert str(caught.value) == (
        f"{paths.lock_path} cannot be written (Permission denied) by user 0; expected a run folder "
        "that this user may write. Go on as the user who began the run, or copy its folder and set "
        "run.dir to the copy."
    )
