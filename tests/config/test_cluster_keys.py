"""Keys of `local`, `restart`, `watchdog`, `slurm` and `ray`: each is flipped, and jobs differ."""

import functools
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from support.keys.flips import Flip, assert_effect

from dpo_dist.config.run_config import RunConfig
from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.run import attempts
from dpo_dist.run.local_ranks import count_workers
from dpo_dist.run.pipeline import stages_of
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import update_status
from dpo_dist.submission.sbatch import job_options
from dpo_dist.watch.heartbeat import during
from dpo_dist.watch.peers import Pulse, Word
from dpo_dist.watch.watchdog import Watchdog

LAUNCH = Path(__file__).parents[2] / "launch"


@functools.cache
def launcher(name: str) -> Any:
    """A program of launch/ as a module; nothing else imports it."""
    if str(LAUNCH) not in sys.path:
        sys.path.append(str(LAUNCH))
    return importlib.import_module(name)


def ranks_here(config: RunConfig) -> int:
    """Ranks of a distributed stage on this machine."""
    return count_workers(config.local)[0]


def restarts(config: RunConfig, *, with_progress: bool = True) -> int:
    """How often a stage that is lost again and again is started anew."""
    paths = RunDir(config.run.dir)
    attempts.begin(paths, "train", config.restart, resubmitted=False)
    for count in itertools.count():
        if with_progress:
            update_status(paths.status_path, progress=f"step-{count}")
        try:
            attempts.begin(paths, "train", config.restart, resubmitted=True)
        except attempts.RestartLimitError:
            return count
    raise AssertionError


def fruitless_restarts(config: RunConfig) -> int:
    """As `restarts`, where nothing is committed in between."""
    return restarts(config, with_progress=False)


def patience(config: RunConfig) -> dict[str, int]:
    """Seconds until the watchdog finds a hang, by the section in which a process makes no progress,
    and of rank 0 of two when the other one says nothing."""
    found = {}
    for name in WatchdogSection.model_fields:
        dog = Watchdog(config.watchdog, 0, 2, lambda error, late: None)
        words = []
        if name == "silent":
            words = [Word(Pulse(1, "far", "push", 0, None, "-", waits=True))]
        with during(name) if name != "silent" else during("network"):  # pyright: ignore[reportArgumentType]
            for seconds in itertools.count(0, 5):
                if dog.look(None, words if seconds == 0 else [], 5.0):
                    found[name] = seconds
                    break
    return found


def jobs(config: RunConfig) -> dict[str, list[str]]:
    """The options of every stage's Slurm job."""
    return {stage.name: job_options(config, stage) for stage in stages_of(config)}


def workers(config: RunConfig) -> Any:
    """What Ray is asked for when a distributed stage starts."""
    return launcher("ray_resources").scaling_config(config.ray, True)


def reference_parts(config: RunConfig) -> list[str]:
    """The parts of the reference pass that become Ray tasks of their own."""
    return launcher("ray_reference").reference_parts(config.ray)


JOB = {
    "partition": "big", "account": "me", "nodes": 8, "tasks_per_node": 4, "gpus_per_node": 4,
    "cpus_per_task": 6, "time": "12:00:00", "options": ["--qos=high"],
}  # fmt: skip
FLIPS = [
    Flip("local.workers", 5, ranks_here),
    Flip("restart.max_restarts", 7, restarts),
    Flip("restart.max_without_progress", 1, fruitless_restarts),
    *(Flip(f"watchdog.{key}", 2000.0, patience) for key in WatchdogSection.model_fields),
    *(Flip(f"slurm.{key}", value, jobs) for key, value in JOB.items()),
    Flip("slurm.stages", {"train": {"nodes": 8}}, jobs),
    *(
        Flip(f"slurm.stages.NAME.{key}", value, jobs, {"slurm.stages": {"train": {}}})
        for key, value in JOB.items()
    ),
    Flip("ray.workers", 4, workers),
    Flip("ray.min_workers", 2, workers, {"ray.workers": 4}),
    Flip("ray.gpus_per_worker", 0.0, workers),
    Flip("ray.cpus_per_worker", 3.0, workers),
    Flip("ray.placement", "SPREAD", workers),
    Flip("ray.reference_tasks", 3, reference_parts),
]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "run.yaml"
    path.write_text("{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}")
    return path


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_a_cluster(flip: Flip, run_yaml: Path) -> None:
    if flip.key.startswith("ray."):
        pytest.importorskip("ray")
    assert_effect(flip, run_yaml)
