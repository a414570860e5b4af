"""Decisions between the steps of a Slurm job, for slurm/dpo.sh.

    python launch/attempt.py begin STAGE run.yaml [section.key=value ...]
    python launch/attempt.py judge STAGE run.yaml [section.key=value ...]

Reads what the ranks wrote into status.json: srun's exit code gets lost on the way.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from command_line import ConfigPath, Overrides, start

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import load_config
from dpo_dist.run import attempts, pipeline
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.run_dir import RunDir

StageName = Annotated[str, typer.Argument(metavar="STAGE")]


def begin(stage_name: StageName, config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Print "skip", or the number of tasks (1 or all) and the log folder of a new attempt.

    Also writes the resolved config.
    """
    print(attempts.patiently(lambda: _begin(stage_name, config_path, overrides or [])))


def _begin(stage_name: str, config_path: Path, overrides: list[str]) -> str:
    stage = pipeline.submitted_stage(stage_name)
    config = load_config(config_path, overrides)
    paths = RunDir(config.run.dir)
    if stage == pipeline.PUSH and config.export.push_to_hub is None:
        return "skip"
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "DPO_DIST_AGAIN"))
    resubmitted = any(int(count) > 0 for count in restarts)
    log_dir = attempts.begin(paths, stage.name, config.restart, resubmitted=resubmitted)
    if log_dir is None:
        return "skip"
    write_atomic(paths.config_path, to_yaml(config))
    return f"{'all' if stage.distributed else '1'} {log_dir.absolute()}"


def judge(stage_name: StageName, config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Print "next", "again", or "requeue" after a signal; exit with the stage's code otherwise."""
    outcome, failure = attempts.patiently(lambda: _judge(stage_name, config_path, overrides or []))
    if failure:
        print(failure, file=sys.stderr)
    if outcome.verdict == "stop":
        raise typer.Exit(outcome.exit_code)
    print({"next": "next", "restart": "again", "stopped": "requeue"}[outcome.verdict])


def _judge(
    stage_name: str, config_path: Path, overrides: list[str]
) -> tuple[attempts.Outcome, str]:
    stage = pipeline.submitted_stage(stage_name)
    paths = RunDir(load_config(config_path, overrides).run.dir)
    outcome = attempts.judge(paths, stage.name)
    if outcome.verdict == "next":
        return outcome, ""
    failure = attempts.first_failure(paths.latest_log_link)
    return outcome, f"{stage.name}: {outcome.reason}\n{failure}"


if __name__ == "__main__":
    start(begin, judge)
