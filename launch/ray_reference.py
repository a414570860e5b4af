"""The reference pass in independent tasks; one that is lost costs its own range only."""

import os
import sys
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray_rank import rendezvous, run_rank

from dpo_dist.config.cluster_section import RaySection
from dpo_dist.config.run_config import RunConfig
from dpo_dist.run import attempts
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import Topology


def reference_parts(section: RaySection) -> list[str]:
    """`reference.part` of each independent task; none where ranks score together."""
    count = section.reference_tasks
    return [f"{number}/{count}" for number in range(1, count + 1)]


def score_in_tasks(config: RunConfig, parts: list[str]) -> None:
    """Scores the missing pairs in independent tasks.

    The reference stage that follows finds the rows there, or scores what is still missing, and
    says why when it cannot.
    """
    section = config.ray
    score = ray.remote(_score_part).options(
        num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, max_retries=3
    )
    print(f"reference: {len(parts)} independent tasks", flush=True)
    paths = RunDir(config.run.dir)
    log_dir = attempts.new_log_dir(paths, "reference")
    common = (str(paths.root), str(log_dir), os.getcwd())
    tasks = [score.remote(part, *common) for part in parts]
    for task in tasks:
        try:
            ray.get(task)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            print(f"reference: {reason}; left to the stage", file=sys.stderr, flush=True)


def _score_part(part: str, run_dir: str, log_dir: str, submitted_from: str) -> None:
    paths = RunDir(Path(run_dir))
    job = {
        "stage": "reference",
        "config_path": str(paths.config_path),
        "overrides": [f"reference.part={part}", "reference.sharding=whole"],
        "submitted_from": submitted_from,
    }
    code = run_rank(job, Topology(0, 1, 0, 1, *rendezvous()), Path(log_dir), paths)
    if code:
        ended = f"ended with {code}" if code > 0 else f"was {attempts.died_of(-code)}"
        raise RuntimeError(f"part {part} of the reference pass {ended}")
