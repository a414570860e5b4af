"""SIGQUIT to a run: every rank writes where it is into its log, and goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import ROOT, wait_until
from support.tiny_run import make_run, metrics_of, succeed_on

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_ranks_write_their_stacks_and_go_on(tmp_path: Path) -> None:
    run_yaml, out = make_run(tmp_path), tmp_path / "out"
    for stage in ("prepare", "reference"):
        succeed_on(1, stage, run_yaml)
    settings = ["train.num_epochs=8", "checkpoint.every_steps=1000", "eval.every_steps=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_dist", "train", str(run_yaml), *settings],
        cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        written = out / "metrics.jsonl"
        wait_until(lambda: written.exists() and len(metrics_of(out)) > 2, timeout_s=200)
        process.send_signal(signal.SIGQUIT)
        logs = [out / "logs" / "train-01" / f"rank000{rank}.log" for rank in range(2)]
        for log in logs:
            wait_until(lambda log=log: "most recent call first" in log.read_text())
        assert process.wait(200) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert metrics_of(out)[-1]["step"] == 40
    assert all("_train" in log.read_text() for log in logs)
