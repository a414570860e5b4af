"""status.json: states of the stages beside each other, and what a person reads."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.commands import as_command, dpo_dist, succeed
from support.ranks import started_ranks, wait_until
from support.tiny_run import make_run, succeed_on

from dpo_dist.run.status import (
    describe_status,
    is_overdue,
    last_word,
    read_status,
    update_stage,
    update_status,
)


def test_stages_are_noted_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    update_stage(path, "prepare", "finished", artefact="pairs")
    update_stage(path, "train", "running")
    status = read_status(path)
    assert status["stage"] == "train" and status["state"] == "running"
    assert status["stages"] == {
        "prepare": {"state": "finished", "artefact": "pairs"},
        "train": {"state": "running"},
    }


def test_what_a_person_reads() -> None:
    status: dict[str, Any] = {
        "stage": "train", "state": "failed", "time": time.time() - 5, "host": "n1", "pid": 7,
        "train": {
            "step": 10, "num_steps": 40, "seconds_per_step": 120.0, "loss": 0.5,
            "rewards/margins": 1.25, "rewards/accuracies": 0.75, "pairs_per_second": 3.0,
        },
        "reference": {"num_scored": 1200, "num_missing": 2000, "pairs_per_second": 4.0},
        "last_checkpoint": "runs/x/checkpoints/step-000010",
        "restarts": {"total": 2},
        "stages": {"train": {"state": "failed", "error": "boom"}},
    }  # fmt: skip
    lines = dict(describe_status(status))
    assert lines.pop("updated") == "5 s ago on n1 (pid 7)"
    assert lines == {
        "stage": "train failed",
        "step": "10 of 40",
        "loss": "0.5000",
        "margin": "1.2500",
        "accuracy": "0.750",
        "pairs/s": "3.00",
        "time left": "1.0 h",
        "reference": "1,200 of 2,000 new pairs scored, 4.00 pairs/s, 3.3 min left",
        "last checkpoint": "runs/x/checkpoints/step-000010",
        "restarts": "2",
        "error": "boom",
    }
    status["reference"]["num_scored"] = 2000
    assert dict(describe_status(status))["reference"] == "2,000 of 2,000 new pairs scored"


def test_the_command(tmp_path: Path) -> None:
    update_status(tmp_path / "status.json", stage="train", state="running")
    assert "train running" in succeed("status", tmp_path).stdout
    assert json.loads(succeed("status", tmp_path, "--json").stdout)["state"] == "running"
    done = dpo_dist("status", tmp_path / "none")
    assert done.returncode == 2
    assert "does not exist; expected the folder of a run." in done.stderr
    assert "Name the run.dir of a run.yaml." in done.stderr


def test_truth_18_a_word_that_is_overdue_is_told(tmp_path: Path) -> None:
    """As when one rank is stopped, and the others wait for it in a collective."""
    path, heartbeat = tmp_path / "status.json", tmp_path / "heartbeat.json"
    update_stage(path, "train", "running")
    heartbeat.write_text('{"section": "step", "limit": 90}')

    def shown(seconds: float, clock: float = 0.0) -> str:
        """What is said when the last word is so old, and its writer's clock so far ahead."""
        update_status(path)
        status = read_status(path) | {"time": time.time() + clock}
        path.write_text(json.dumps(status))
        for file in (path, heartbeat):
            if file.exists():
                os.utime(file, (time.time() - seconds, time.time() - seconds))
        age, limit = last_word(path, heartbeat)
        assert ("silent" in dict(describe_status(status, age, limit))) == is_overdue(
            status, age, limit
        )
        return dict(describe_status(status, age, limit)).get("silent", "")

    assert re.fullmatch(r"no word for 12[1-9] s \(limit 90 s\)", shown(121))
    assert not shown(40)
    assert not shown(10, clock=-7200), "a clock that is behind is no silence"
    heartbeat.write_text('{"section": "step", "limit": 600}')
    assert not shown(500), "a slow run is not a silent one"
    heartbeat.write_text('{"section": "network", "limit": null}')
    assert not shown(50000), "what has no limit is never overdue"
    heartbeat.unlink()
    assert not shown(1000) and "(limit 1,800 s)" in shown(2000)
    update_stage(path, "export", "finished")
    assert not shown(5000)


def test_check_exits_by_what_it_found(tmp_path: Path) -> None:
    path, heartbeat = tmp_path / "status.json", tmp_path / "heartbeat.json"
    update_stage(path, "train", "running")
    heartbeat.write_text('{"section": "step", "limit": 90}')
    succeed("status", tmp_path, "--check")
    for file in (path, heartbeat):
        os.utime(file, (time.time() - 121, time.time() - 121))
    done = dpo_dist("status", tmp_path, "--check")
    assert done.returncode == 1
    assert re.search(r"^silent +no word for 12\d s \(limit 90 s\)$", done.stdout, re.M)
    late = [{"rank": 3, "host": "n7", "section": "step"}]
    update_stage(path, "train", "failed", error="boom", late=late)
    update_status(path, late=late)
    done = dpo_dist("status", tmp_path, "--check")
    assert done.returncode == 1
    assert re.search(r"^last hang +rank 3 on n7 in step$", done.stdout, re.M)


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_truth_18_a_stopped_run_is_told_within_its_limit(tmp_path: Path) -> None:
    """SIGSTOP to both ranks of a real training, of which none is left to find it."""
    run_yaml = make_run(tmp_path)
    succeed_on(1, "prepare", run_yaml)
    succeed_on(2, "reference", run_yaml)
    settings = ("train.num_epochs=10000", "watchdog.step=3")
    with started_ranks(2, as_command, "train", str(run_yaml), *settings) as ranks:
        path, heartbeat = (tmp_path / "out" / name for name in ("status.json", "heartbeat.json"))
        wait_until(lambda: '"step"' in heartbeat.read_text() if heartbeat.exists() else False, 200)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: is_overdue(read_status(path), *last_word(path, heartbeat)), 200)
        said = dpo_dist("status", path.parent, "--check")
    assert said.returncode == 1
    assert re.search(r"^silent +no word for \d+ s \(limit \d+ s\)$", said.stdout, re.M), said
