"""What is asked of Ray. tests/clusters/test_ray.py runs it on a real cluster."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ranks import ROOT

from dpo_dist.config.cluster_section import RaySection, RestartSection
from dpo_dist.config.run_config import load_config, parse_config
from dpo_dist.errors import ArtifactError, ClusterError, ConfigError
from dpo_dist.run import attempts
from dpo_dist.run import lock as run_lock
from dpo_dist.run.manifest import write_json
from dpo_dist.run.pipeline import STAGES
from dpo_dist.run.run_dir import RunDir, rank_failure_path
from dpo_dist.run.status import update_stage
from dpo_dist.run.topology import Topology

LAUNCHER = ROOT / "launch" / "ray_launcher.py"
NODES = [{"CPU": 32.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 8.0}, {"CPU": 8.0}]


@pytest.fixture(scope="module")
def launch() -> Any:
    """The launcher's modules, imported only here since they bring Ray."""
    pytest.importorskip("ray")
    import ray_rank
    import ray_resources
    import ray_run
    import ray_worker

    return SimpleNamespace(resources=ray_resources, run=ray_run, worker=ray_worker, rank=ray_rank)


def section(**values: Any) -> RaySection:
    return RaySection.model_validate(values)


@pytest.mark.parametrize(
    ("values", "room"),
    [
        (dict(), 16),
        (dict(cpus_per_worker=8.0), 8),
        (dict(gpus_per_worker=0.0, cpus_per_worker=8.0), 9),
        (dict(gpus_per_worker=4.0), 4),
    ],
)
def test_room_is_counted_node_by_node(launch: Any, values: dict[str, Any], room: int) -> None:
    assert launch.resources.count_workers(section(**values), NODES) == room


@pytest.mark.fault(
    9,
    "more than the cluster has",
    becomes="an error with the room there is, no wait",
)
def test_too_few_resources_are_said_at_once(launch: Any) -> None:
    launch.resources.check_resources(section(workers=16), NODES)
    with pytest.raises(ClusterError) as error:
        launch.resources.check_resources(section(workers=17), NODES)
    assert str(error.value) == (
        "the cluster has room for 16 workers of 1 GPUs and 1 CPUs (3 nodes: 8 GPUs and 32 CPUs, 8 "
        "GPUs and 32 CPUs, 0 GPUs and 8 CPUs); expected room for 17. Lower ray.workers, "
        "ray.gpus_per_worker or ray.cpus_per_worker, or add nodes."
    )
    launch.resources.check_resources(section(workers=17, min_workers=9), NODES)


@pytest.mark.parametrize(("placement", "room"), [("STRICT_PACK", 8), ("STRICT_SPREAD", 2)])
def test_a_strict_placement_has_less_room(launch: Any, placement: str, room: int) -> None:
    launch.resources.check_resources(section(workers=room, placement=placement), NODES)
    with pytest.raises(ClusterError) as error:
        launch.resources.check_resources(section(workers=room + 1, placement=placement), NODES)
    assert str(error.value) == (
        f"the cluster has room for {room} workers of 1 GPUs and 1 CPUs placed {placement} (3 "
        "nodes: 8 GPUs and 32 CPUs, 8 GPUs and 32 CPUs, 0 GPUs and 8 CPUs); expected room for "
        f"{room + 1}. Lower ray.workers, ray.gpus_per_worker or ray.cpus_per_worker, set "
        "ray.placement=PACK, or add nodes."
    )


def test_the_scaling_that_ray_is_asked_for(launch: Any) -> None:
    scaling = launch.resources.scaling_config(
        section(workers=4, min_workers=2, gpus_per_worker=2.0, placement="SPREAD"), True
    )
    assert scaling.num_workers == (2, 4) and scaling.placement_strategy == "SPREAD"
    assert scaling.use_gpu and scaling.resources_per_worker == {"CPU": 1.0, "GPU": 2.0}
    alone = launch.resources.scaling_config(section(workers=4, gpus_per_worker=0.0), False)
    assert alone.num_workers == 1 and not alone.use_gpu
    assert alone.resources_per_worker == {"CPU": 1.0}


def test_a_node_needs_no_launch_folder(launch: Any, tmp_path: Path) -> None:
    """What runs in a worker comes by value, the functions that it calls included."""
    from ray import cloudpickle
    from ray_reference import _score_part

    sent = cloudpickle.dumps([launch.worker.work, launch.worker.SharedGPUsConfig(), _score_part])
    program = (
        "import sys; from ray import cloudpickle\n"
        "for got in cloudpickle.loads(sys.stdin.buffer.read()): print(got)\n"
        "assert not [name for name in sys.modules if name in ('ray_worker', 'ray_rank')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, input=sent, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"<function work " in done.stdout and b"<function _score_part " in done.stdout


def test_a_worker_lost_after_the_end_starts_nothing_again(launch: Any, tmp_path: Path) -> None:
    config = parse_config(
        {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    )
    paths = RunDir(tmp_path)
    update_stage(paths.status_path, "train", "finished")
    assert launch.worker.begin(paths, "train", config) is None
    assert not paths.logs_dir.exists()


def test_a_rank_that_fails_for_good_ends_the_group_and_the_stage(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 would wait for it for ever: its worker raises, and the next group starts nothing."""
    monkeypatch.setattr(launch.worker, "FINAL_STATE_S", 0.1)
    config = parse_config(
        {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    )
    paths = RunDir(tmp_path)
    log_dir = attempts.begin(paths, "train", config.restart, resubmitted=False)
    assert log_dir is not None
    update_stage(paths.status_path, "train", "running")
    write_json(rank_failure_path(log_dir, 1), {"error": "no model", "exit_code": 2})
    assert launch.worker.settled(paths, "train", 2).verdict == "restart"
    assert launch.worker.begin(paths, "train", config) is None
    assert paths.count_attempts("train") == 1
    outcome = attempts.judge(paths, "train")
    assert (outcome.verdict, outcome.reason) == ("stop", "rank 1: no model")
    attempts.forget(paths)
    assert attempts.judge(paths, "train").verdict == "restart", "a new submission tries again"


def test_truth_07_a_worker_tells_which_signal_killed_its_rank(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.rank, "POLL_S", 0.05)
    monkeypatch.setattr(launch.rank, "SHOWN", ())
    suicide = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(launch.rank, "stage_argv", lambda *_: suicide)
    paths = RunDir(tmp_path)
    log_dir = attempts.begin(paths, "train", RestartSection.model_validate({}), resubmitted=False)
    job = {"stage": "train", "config_path": "run.yaml", "submitted_from": str(tmp_path)}
    place = Topology(1, 2, 1, 2, "127.0.0.1", 1)
    assert launch.rank.run_rank(job, place, log_dir, paths) == -9
    outcome = launch.worker.settled(paths, "train", -9)
    assert outcome.verdict == "restart"
    assert outcome.reason == "rank 1: killed by signal 9, often out of memory"


def test_a_folder_of_another_job_ends_the_stage_instead_of_starting_it_again(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.run.attempts.DYING_S", 0.1)
    config = parse_config(
        {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    )
    paths = RunDir(tmp_path)
    with run_lock.held(paths, "train"):
        assert launch.worker.begin(paths, "train", config) is None
    outcome = attempts.judge(paths, "train")
    assert (outcome.verdict, outcome.exit_code) == ("stop", 2)
    assert "is in use (train, process" in outcome.reason


def test_a_folder_of_another_job_is_left_as_it_is(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that need a cluster are left out."""
    monkeypatch.setattr("dpo_dist.run.attempts.DYING_S", 0.1)
    monkeypatch.setattr(launch.run.ray, "init", lambda **_: None)
    monkeypatch.setattr(launch.run.ray, "nodes", lambda: [])
    monkeypatch.setattr(launch.run, "check_resources", lambda *_: None)
    monkeypatch.setattr(launch.run, "take_run_dir", lambda _: None)
    config = tmp_path / "run.yaml"
    config.write_text("{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}")
    paths = RunDir(tmp_path / "out")
    update_stage(paths.status_path, "train", "running")
    before = paths.status_path.read_bytes()
    with (
        run_lock.held(paths, "train"),
        pytest.raises(ArtifactError, match=r"out is in use \(train, process"),
    ):
        launch.run.run(load_config(config, [f"run.dir={paths.root}"]), STAGES)
    assert paths.status_path.read_bytes() == before and not paths.config_path.exists()


def test_without_a_cluster(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}")
    done = subprocess.run(
        [sys.executable, LAUNCHER, config],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: no Ray cluster runs here; expected a running cluster. Start one with "
        "launch/ray_up.sh, or submit with `ray job submit` (docs/ray.md)."
    )


def test_fewer_workers_than_the_fewest() -> None:
    with pytest.raises(
        ConfigError, match="ray.min_workers: 3 with ray.workers 2; expected at most"
    ):
        parse_config(
            {
                "run": {"dir": "r"},
                "model": {"path": "m"},
                "data": {"train": [{"path": "a"}]},
                "ray": {"workers": 2, "min_workers": 3},
            }  # fmt: skip
        )
