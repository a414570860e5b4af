"""Whole runs on a GPU against the same run on the CPU: sharding, offload, QLoRA, signals, export.

DPO_DIST_GPU_DEVICE=cpu takes the same way on the CPU, to try these tests themselves.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import succeed
from support.ranks import ROOT, SETTINGS, wait_until
from support.tiny_run import make_run, metrics_of, same_training

DRY = os.environ.get("DPO_DIST_GPU_DEVICE") == "cpu"
NUM_STEPS = 10
pytestmark = [
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """run.yaml, and the losses of a run in float32 on the CPU."""
    run_yaml = make_run(tmp_path_factory.mktemp("gpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return run_yaml, losses(run(run_yaml, "cpu", "local.workers=1"))


def run(run_yaml: Path, name: str, *overrides: str) -> Path:
    """All stages, the verified export included; the run folder."""
    folder = run_yaml.parent / name
    arguments = ["run", str(run_yaml), f"run.dir={folder}", *overrides]
    if DRY:
        succeed(*arguments)
    else:  # no fork of a process whose libraries have chosen their device
        command = [sys.executable, "-m", "dpo_dist", *arguments]
        subprocess.check_call(command, cwd=ROOT, env=os.environ | SETTINGS)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(folder) if "loss" in line]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "sharding", ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_param"]
)
def test_sharded_runs_equal_the_cpu(
    sharding: str,
    workers: int,
    on_cpu: tuple[Path, list[float]],
    record_property: Callable[[str, object], None],
) -> None:
    if workers > 1 and torch.cuda.device_count() < workers and not DRY:
        pytest.skip(f"needs {workers} GPUs, and this machine has {torch.cuda.device_count()}")
    run_yaml, expected = on_cpu
    if sharding == "zero3_offload_param":
        path = run_yaml.parent / "offload_param.json"
        zero = {"stage": 3, "offload_param": {"device": "cpu"}}
        zero |= {"offload_optimizer": {"device": "cpu"}}
        sharded = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        path.write_text(json.dumps(sharded))
        sharding = str(path)
    settings = f"train.deepspeed={sharding}", f"local.workers={workers}"
    found = losses(run(run_yaml, f"{Path(sharding).stem}-{workers}", *settings))
    away = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    record_property("largest difference of a loss", f"{away:.1e}")
    assert away < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        ("model.quantization=nf4", "adapter.rank=4"),
        ("train.optimizer=adamw_8bit",),
        ("train.optimizer=paged_adamw",),
        ("train.optimizer=paged_adamw_8bit",),
    ],
    ids=lambda settings: settings[0],
)
def test_bitsandbytes_trains_and_exports(
    settings: tuple[str, ...],
    on_cpu: tuple[Path, list[float]],
    record_property: Callable[[str, object], None],
) -> None:
    pytest.importorskip("bitsandbytes")
    if DRY and "paged" in settings[0]:
        pytest.skip("paging needs a GPU")
    name = settings[0].split("=")[1]
    found = losses(run(on_cpu[0], name, "train.deepspeed=zero2", "local.workers=1", *settings))
    record_property("first and last loss", f"{found[0]:.4f}, {found[-1]:.4f}")
    assert found[-1] < found[0]


def test_nf4_gives_the_numbers_of_the_cpu(
    on_cpu: tuple[Path, list[float]],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """The same packed bits, unpacked by another kernel."""
    pytest.importorskip("bitsandbytes")
    settings = ("model.quantization=nf4", "adapter.rank=4", "local.workers=1")
    found = losses(run(on_cpu[0], "nf4-here", *settings))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    expected = losses(run(on_cpu[0], "nf4-cpu", *settings))
    away = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    record_property("largest difference of a loss", f"{away:.1e}")
    assert away < 5e-3


def test_stopped_by_a_signal_and_resumed_equals_unbroken(
    on_cpu: tuple[Path, list[float]],
) -> None:
    """With train.deterministic, to the bit."""
    run_yaml, settings = on_cpu[0], ("local.workers=1", "train.deterministic=true")
    whole = run(run_yaml, "whole", *settings)
    folder = run_yaml.parent / "broken"
    command = [sys.executable, "-m", "dpo_dist", "run", str(run_yaml), f"run.dir={folder}"]
    # as many threads as in `run`: sums on the CPU depend on it
    started = subprocess.Popen([*command, *settings], cwd=ROOT, env=os.environ | SETTINGS)
    try:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, 300)
        started.send_signal(signal.SIGTERM)
        assert started.wait(300) in (0, 75)  # 0: it had been too fast
    finally:
        started.kill()
    same_training(whole, run(run_yaml, "broken", *settings), NUM_STEPS)
