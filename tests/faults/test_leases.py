"""One run folder, one run, on a file system without flock: FAULTS 19."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.faults.lying import in_processes, lies_of
from support.ranks import wait_until

from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.run import attempts
from dpo_dist.run.run_dir import RunDir
from dpo_dist.watch import lease

LEAVING_S = 30.0  # of ranks whose stage has hung
RENEW_S, LIMIT_S = 0.2, 2.0
# Holds the folder, and writes into it what others would see, as often as it can.
HOLDER = f"""
import sys, time
from pathlib import Path
from dpo_dist.errors import ArtifactError
from dpo_dist.run import lock
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.run_dir import RunDir
from dpo_dist.watch import lease
lease.RENEW_S, lease.LIMIT_S = {RENEW_S}, {LIMIT_S}
root, wait_s, name = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
try:
    with lock.held(RunDir(root), "train", wait_s):
        print("held", flush=True)
        for line in sys.stdin:
            break
        while "writer" in name:
            write_atomic(root / "written.by", name)
            time.sleep(0.05)
except ArtifactError as error:
    print(error, flush=True)
    sys.exit(2)
"""


class Holder:
    """A process that holds a run folder, or is refused, on a file system without flock."""

    def __init__(self, root: Path, wait_s: float = 0, name: str = "", **environment: str) -> None:
        lies = lies_of(root.parent, LIE_FLOCK=errno.ENOLCK)
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(root), str(wait_s), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=in_processes(lies | environment), start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout and self.process.stderr

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def go_on(self) -> None:
        """Writes for ever, or gives the folder back."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def holders(tmp_path: Path):
    """Starts holders of one folder, and kills what is left of them."""
    started: list[Holder] = []

    def start(wait_s: float = 0, name: str = "", **environment: str) -> Holder:
        started.append(Holder(tmp_path / "run" / "out", wait_s, name, **environment))
        return started[-1]

    (tmp_path / "run").mkdir()
    yield start
    for holder in started:
        holder.process.kill()
        holder.process.communicate()


@pytest.mark.fault(
    19,
    "two runs in one folder, without flock",
    becomes="the second is refused by the name of the first",
)
def test_fault_19_a_second_run_is_refused_by_name_without_flock(tmp_path: Path, holders) -> None:
    holder = holders(SLURM_JOB_ID="77")
    assert holder.says() == "held\n"
    time.sleep(LIMIT_S + 1)  # it renews
    owner = f"job 77, train, process {holder.pid} on {socket.gethostname()}"
    said = f"{tmp_path}/run/out is in use ({owner}); expected one job at a time in a run folder. "
    assert holders().says().startswith(said)
    run_yaml, lies = tmp_path / "run.yaml", lies_of(tmp_path / "run", LIE_FLOCK=errno.EOPNOTSUPP)
    run_yaml.write_text(
        f"{{run: {{dir: {tmp_path}/run/out}}, model: {{path: m}}, data: {{train: [{{path: a}}]}}}}"
    )
    refused = subprocess.run(
        [sys.executable, "-m", "dpo_dist", "prepare", str(run_yaml)],
        env=in_processes(lies) | {"COLUMNS": "999"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "out").iterdir())
    assert left == ["lease", "run.lock"], "nothing is written"
    holder.go_on()
    assert holders(wait_s=30).says() == "held\n", "given back"


def test_fault_19_of_many_that_start_at_once_one_gets_the_folder(holders) -> None:
    said = [holder.says() for holder in [holders() for _ in range(4)]]
    assert sum(line == "held\n" for line in said) == 1, said
    assert sum(" is in use (" in line for line in said) == 3, said


@pytest.mark.fault(
    19,
    "the owner of a lease is killed",
    becomes="taken over at once on its machine",
)
def test_fault_19_a_killed_owner_on_this_machine_is_taken_over_at_once(holders) -> None:
    holder = holders()
    assert holder.says() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)  # not waited for: a zombie is gone too
    wait_until(lambda: holder.process.stdout is not None and holder.says() == "", 10)
    assert holders().says() == "held\n"


def test_fault_19_an_owner_on_another_machine_is_taken_over_when_its_lease_is_old(
    tmp_path: Path, holders
) -> None:
    holder, folder = holders(), RunDir(tmp_path / "run" / "out").lease_dir
    assert holder.says() == "held\n"
    holder.process.kill()
    holder.process.communicate()
    (path,) = folder.iterdir()
    path.write_text(path.read_text().replace('"machine": "', '"machine": "another '))
    assert " is in use (" in holders().says()
    assert holders(wait_s=30).says() == "held\n"
    assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002"]


@pytest.mark.fault(
    19,
    "an owner is stopped until its lease is taken over, and woken",
    becomes="it leaves without writing",
)
def test_fault_19_an_owner_that_was_stopped_and_wakes_leaves_without_writing(
    tmp_path: Path, holders
) -> None:
    former, written = holders(name="former writer"), tmp_path / "run" / "out" / "written.by"
    assert former.says() == "held\n"
    former.go_on()
    wait_until(written.exists, 10)
    os.kill(former.pid, signal.SIGSTOP)
    owner = holders(wait_s=30, name="new writer")
    assert owner.says() == "held\n"
    owner.go_on()
    wait_until(lambda: written.read_text() == "new writer", 10)
    owner.process.send_signal(signal.SIGSTOP)  # so that what the former writes would be seen
    time.sleep(0.2)
    os.kill(former.pid, signal.SIGCONT)
    _, said = former.process.communicate(timeout=30)
    assert former.process.returncode == 2
    assert f"error: {tmp_path}/run/out was taken over by train, process {owner.pid} on " in said
    assert "This process writes nothing more" in said
    assert written.read_text() == "new writer"


def test_fault_19_a_suspended_owner_that_nobody_took_over_goes_on(holders) -> None:
    holder = holders()
    assert holder.says() == "held\n"
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(LIMIT_S + 1)
    os.kill(holder.pid, signal.SIGCONT)
    time.sleep(3 * RENEW_S)
    holder.go_on()
    assert holder.process.wait(timeout=30) == 0


def test_a_lease_outlives_the_ranks_of_an_owner_that_says_nothing() -> None:
    silent = WatchdogSection().silent  # pyright: ignore[reportCallIssue]
    assert silent is not None and silent + LEAVING_S <= lease.LIMIT_S < attempts.DYING_S
