"""status.json: states of the stages beside each other, and what a person reads."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.ranks import started_ranks, wait_until
from support.tiny_run import as_command, dpo_dist, make_run, succeed, succeed_on

from dpo_dist.run.status import (
    age_of,
    describe_status,
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
    path = tmp_path / "status.json"
    update_stage(path, "train", "running")
    update_status(path, pace=2.0)

    def shown(seconds: float, clock: float = 0.0) -> str:
        """What the command says when the word is so old, its writer's clock so far ahead."""
        update_status(path)
        status = read_status(path) | {"time": time.time() + clock}
        path.write_text(json.dumps(status))
        os.utime(path, (time.time() - seconds, time.time() - seconds))
        return succeed("status", tmp_path).stdout

    silent = re.search(
        r"^silent +no word for (12[1-9]) s, expected one within 60 s$", shown(121), re.M
    )
    assert silent, "nothing is said of it"
    assert "silent" not in shown(40)
    assert "silent" not in shown(10, clock=-7200), "a clock that is behind is no silence"
    update_status(path, pace=60.0)
    assert "silent" not in shown(500), "a slow run is not a silent one"
    update_stage(path, "export", "running")  # says nothing of its own for long
    assert "silent" not in shown(1000) and "within 1,800 s" in shown(2000)
    update_stage(path, "export", "finished")
    assert "silent" not in shown(5000)


@pytest.mark.slow  # a minute of silence
@pytest.mark.timeout(400)
def test_truth_18_a_stopped_rank_is_told_within_its_limit(tmp_path: Path) -> None:
    """SIGSTOP to one of two ranks of a real training: the other waits for it in a collective."""
    run_yaml = make_run(tmp_path)
    succeed_on(1, "prepare", run_yaml)
    succeed_on(2, "reference", run_yaml)
    with started_ranks(2, as_command, "train", str(run_yaml), "train.num_epochs=10000") as ranks:
        path = tmp_path / "out" / "status.json"
        wait_until(lambda: (read_status(path).get("train") or {}).get("step", 0) >= 3, 120)
        assert "silent" not in succeed("status", path.parent).stdout
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        wait_until(lambda: age_of(path) > 61, 120)
        said = succeed("status", path.parent).stdout
        assert [process.poll() for process in ranks.processes] == [None, None]
    assert re.search(r"^silent +no word for 6\d s, expected one within 60 s$", said, re.M), said
