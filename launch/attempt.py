"""Decisions between the steps of a Slurm job, for slurm/dpo.sh.

    python launch/attempt.py begin STAGE run.yaml [section.key=value ...]
        prints "skip", or the number of tasks (1 or all) and the log folder of the attempt
    python launch/attempt.py judge STAGE run.yaml [section.key=value ...]
        prints "next" or "restart"; exits with the stage's code when neither will help

Reads what the ranks wrote into status.json: srun's exit code gets lost on the way.
"""

import os
import sys
from pathlib import Path

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import load_config
from dpo_dist.errors import DPODistError
from dpo_dist.run import attempts, pipeline
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.run_dir import RunDir


def begin(stage: str, config_path: Path, overrides: list[str]) -> str:
    """The answer to `begin`; also writes the resolved config."""
    config = load_config(config_path, overrides)
    paths = RunDir(config.run.dir)
    if stage == pipeline.PUSH.name and config.export.push_to_hub is None:
        return "skip"
    resubmitted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    log_dir = attempts.begin(paths, stage, config.restart, resubmitted=resubmitted)
    if log_dir is None:
        return "skip"
    write_atomic(paths.config_path, to_yaml(config))
    (found,) = (s for s in (pipeline.DOCTOR, *pipeline.STAGES, pipeline.PUSH) if s.name == stage)
    return f"{'all' if found.distributed else '1'} {log_dir.absolute()}"


def judge(stage: str, config_path: Path, overrides: list[str]) -> str:
    """The answer to `judge`; leaves with the stage's exit code at a failure to stay."""
    paths = RunDir(load_config(config_path, overrides).run.dir)
    outcome = attempts.judge(paths, stage)
    if outcome.verdict != "next":
        print(f"{stage}: {outcome.reason}", file=sys.stderr)
        print(attempts.first_failure(paths.latest_log_link), file=sys.stderr)
    if outcome.verdict == "stop":
        sys.exit(outcome.exit_code)
    return outcome.verdict


def main() -> None:
    command, stage, config_path, *overrides = sys.argv[1:]
    try:
        print({"begin": begin, "judge": judge}[command](stage, Path(config_path), overrides))
    except DPODistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
