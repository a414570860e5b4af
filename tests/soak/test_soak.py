"""A run that nothing can stop: many faults, and weights and metrics of an unbroken run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from soak import STEPS_A_FAULT, STEPS_BETWEEN, run_soak, settings_of
from support.ranks import ROOT
from support.tiny_run import make_run, metrics_of, same_training, succeed_on, weights_of

from dpo_dist.run.run_dir import RunDir

FAULTS = int(os.environ.get("DPO_DIST_SOAK_FAULTS", "200"))
SEED = int(os.environ.get("DPO_DIST_SOAK_SEED", "1"))


def unbroken(folder: Path, steps: int) -> tuple[Path, Path, Path]:
    """(run.yaml, a folder with pairs and reference, the run trained without a fault)"""
    run_yaml = make_run(folder)
    start, trained = folder / "start", folder / "unbroken"
    succeed_on(1, "prepare", run_yaml, f"run.dir={start}")
    succeed_on(2, "reference", run_yaml, f"run.dir={start}")
    shutil.copytree(start, trained)
    arguments = ("train", run_yaml, f"run.dir={trained}", *settings_of(steps))
    succeed_on(2, *arguments, timeout_s=60 + 2 * steps)
    return run_yaml, start, trained


@pytest.mark.fault(
    1,
    "ten faults that a seed decides: signals, damaged files, a full disk",
    becomes="metrics and weights equal an unbroken run",
)
@pytest.mark.timeout(600)
def test_ten_faults_change_no_number(tmp_path: Path) -> None:
    steps = 10 * STEPS_A_FAULT
    run_yaml, start, trained = unbroken(tmp_path, steps)
    told = run_soak(run_yaml, start, tmp_path / "soaked", faults=10, seed=SEED, steps=steps)
    print(told)
    assert told["faults"] >= 10
    same_training(trained, tmp_path / "soaked", steps)


@pytest.mark.fault(
    1,
    "200 of them, with a cut network and other numbers of ranks",
    becomes="metrics and weights equal an unbroken run, within 2e-5 on other ranks",
)
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_soak(tmp_path: Path) -> None:
    """In a network namespace of its own, where this user may have one."""
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "import test_soak; test_soak.soaked(Path(sys.argv[1]))"
    )
    folders = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    command = [sys.executable, "-c", code, str(tmp_path), *folders]
    subprocess.check_call([*namespace(), *command], cwd=ROOT)


def namespace() -> list[str]:
    """A command that runs another one where only this test's processes are on the network."""
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    possible = shutil.which("unshare") and shutil.which("ip")
    if not possible or subprocess.run([*command, "true"], capture_output=True).returncode:
        return []
    return command


def soaked(folder: Path) -> None:
    """FAULTS faults on two ranks, then a tenth of them on one to three."""
    own_network, steps = bool(namespace()), STEPS_BETWEEN * FAULTS  # it takes 1.3 for one
    run_yaml, start, trained = unbroken(folder, steps)
    told = run_soak(
        run_yaml, start, folder / "soaked", faults=FAULTS, seed=SEED, steps=steps,
        own_network=own_network,
    )  # fmt: skip
    print(told, flush=True)
    assert told["faults"] >= FAULTS
    same_training(trained, folder / "soaked", steps)
    few_steps = STEPS_A_FAULT * FAULTS // 10
    more = run_soak(
        run_yaml, start, folder / "elastic", faults=FAULTS // 10, seed=SEED, steps=few_steps,
        elastic=True, own_network=own_network,
    )  # fmt: skip
    print(more, flush=True)
    few = folder / "few"
    shutil.copytree(start, few)
    succeed_on(2, "train", run_yaml, f"run.dir={few}", *settings_of(few_steps))
    almost_same_training(few, folder / "elastic", few_steps)


def almost_same_training(one: Path, other: Path, step: int) -> None:
    """Weights within 1e-5 and metrics within 2e-5, as the order of sums depends on the ranks; of
    log-probs, which are sums of hundreds of nats in float32, within 1e-5 of themselves."""
    pairs = zip(metrics_of(one), metrics_of(other), strict=True)
    for left, right in pairs:
        assert left == pytest.approx(right, rel=1e-5, abs=2e-5)
    left, right = weights_of(one, step), weights_of(other, step)
    assert left.keys() == right.keys() and RunDir(other).checkpoint_dir(step).exists()
    for name in left:
        assert float((left[name] - right[name]).abs().max()) < 1e-5, name
