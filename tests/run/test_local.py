import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_dist.config.cluster_section import LocalSection, RestartSection
from dpo_dist.run import attempts
from dpo_dist.run.local_ranks import count_workers, run_ranks
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import describe_status, read_status

REPORT = "import os; open(f'{os.environ[\"OUT\"]}/{os.environ[\"RANK\"]}', 'w').write('x')"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_every_rank_runs_with_its_place(out: Path) -> None:
    text = (
        "import os\nfrom dpo_dist.run.topology import from_environment\n"
        "t = from_environment()\nprint(t.rank, t.world_size)\n"
        "open(f'{os.environ[\"OUT\"]}/{t.rank}', 'w').write(f'{t.local_rank} {t.world_size} '"
        "+ os.environ['OMP_NUM_THREADS'])\n"
    )
    assert run_ranks(program(text), 2, out / "logs") == 0
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert (out / "0").read_text() == f"0 2 {os.environ.get('OMP_NUM_THREADS', threads)}"
    assert (out / "1").read_text().startswith("1 2 ")
    assert (out / "logs" / "rank0001.log").read_text() == "1 2\n"


def test_a_failed_rank_ends_the_others_and_gives_the_exit_code(
    out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dpo_dist.run.local_ranks.GRACE_S", 0.5)
    text = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': print('the reason', flush=True); sys.exit(7)\n"
        "time.sleep(60); open(os.environ['OUT'] + '/waited', 'w')\n"
    )
    assert run_ranks(program(text), 2, out / "logs") == 7
    assert not (out / "waited").exists(), "the other rank was waited for"
    error = capfd.readouterr().err
    assert "rank 1 failed; the end of" in error and "the reason" in error


@pytest.mark.fault(
    5,
    "two ranks that end at the same time",
    becomes="the one that failed by itself gives the exit code",
)
def test_a_rank_that_lost_another_is_not_the_reason(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first look finds both at work, the second both at their end
    monkeypatch.setattr("dpo_dist.run.local_ranks.POLL_S", 4.0)
    text = "import os, sys, time; time.sleep(1); sys.exit(1 + int(os.environ['RANK']))"
    assert run_ranks(program(text), 2, out / "logs") == 2


def test_death_by_signal_is_reported_as_a_shell_does(out: Path) -> None:
    assert run_ranks(program("import os; os.kill(os.getpid(), 9)"), 1, out / "logs") == 137


@pytest.mark.fault(34, "SIGKILL of rank 1", becomes="told by its signal")
def test_truth_07_a_killed_rank_is_told_by_its_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = RunDir(tmp_path)
    log_dir = attempts.begin(paths, "train", RestartSection.model_validate({}), resubmitted=False)
    assert log_dir is not None
    text = "import os; os.kill(os.getpid(), 9 if os.environ['RANK'] == '1' else 0)"
    assert run_ranks(program(text), 2, log_dir) == 137
    assert "rank 1 was killed by signal 9, often out of memory\n" in capfd.readouterr().err
    outcome = attempts.judge(paths, "train")
    assert (outcome.verdict, outcome.exit_code) == ("restart", 75)
    assert outcome.reason == "rank 1: killed by signal 9, often out of memory"
    attempts.note_end(paths, "train")  # rank 0 said nothing either
    status = dict(describe_status(read_status(paths.status_path)))
    assert status["stage"] == "train failed" and status["error"] == outcome.reason


LAUNCHER = """
import sys
from pathlib import Path
from dpo_dist.run.local_ranks import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], 2, Path(sys.argv[2])))
"""


def start_launcher(text: str, out: Path) -> subprocess.Popen[bytes]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, text, str(out / "logs")], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not all((out / rank).exists() for rank in "01"):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    return launcher


@pytest.mark.fault(6, "USR2 to the launcher", becomes="every rank gets it")
def test_stop_signals_reach_every_rank(out: Path) -> None:
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n" + REPORT + "\ntime.sleep(60)\n"
    )
    launcher = start_launcher(text, out)
    launcher.send_signal(signal.SIGUSR2)
    assert launcher.wait(30) == 75


def test_ranks_die_with_the_launcher(out: Path) -> None:
    text = (
        "import os, time\n"
        "open(f'{os.environ[\"OUT\"]}/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        + REPORT + "\ntime.sleep(60)\n"
    )  # fmt: skip
    launcher = start_launcher(text, out)
    pids = [int((out / f"pid{rank}").read_text()) for rank in "01"]
    launcher.kill()
    launcher.wait(30)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_workers(LocalSection(workers=3)) == (3, "local.workers")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    assert count_workers(LocalSection()) == (3, "3 GPUs found")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = os.cpu_count() or 1
    assert count_workers(LocalSection()) == (min(2, cores), f"no GPU, {cores} cores")
