"""A sweep on this machine: its runs one after the other; a failed one does not stop the rest."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.cli.output import print_error
from dpo_dist.cli.rank import launch
from dpo_dist.errors import EXIT_RESTART
from dpo_dist.run.attempts import RestartLimitError
from dpo_dist.run.logs import console
from dpo_dist.run.pipeline import Stage
from dpo_dist.run.status import read_status, update_stage
from dpo_dist.sweeps.points import INPUT_STAGES, Run, Sweep, link_pairs, links_of, state_of
from dpo_dist.sweeps.results import collect, print_table, write_results

EXIT_SOME_FAILED = 1


def run_sweep(sweep: Sweep, config_path: Path) -> int:
    """Runs what is not done yet, then shows all; 0 when all points are done, 1 when one failed, 75
    when a signal stopped it."""
    last_stage = sweep.stages[-1].name
    for inputs in sweep.inputs:
        points = sweep.points_of(inputs)
        todo = [point for point in points if state_of(point, last_stage).name != "done"]
        for point in points:
            if point not in todo:
                console.print(f"{point.name}: done", markup=False, highlight=False)
        if not todo:
            continue
        code = _run_stages(inputs, INPUT_STAGES, config_path)
        for point in todo if code == 0 else ():
            link_pairs(point)
            code = _run_stages(point, sweep.stages, config_path)
            if code == EXIT_RESTART:
                break
        if code == EXIT_RESTART:
            return code
    return show_sweep(sweep)


def show_sweep(sweep: Sweep) -> int:
    """Writes and shows the results as they are now; 0 when all points are done."""
    rows = collect(sweep)
    write_results(sweep, rows)
    print_table(sweep, rows)
    return 0 if all(row["state"] == "done" for row in rows) else EXIT_SOME_FAILED


def print_commands(sweep: Sweep, config_path: Path) -> None:
    """Prints what `run_sweep` would do."""
    last_stage = sweep.stages[-1].name
    for inputs in sweep.inputs:
        _print_commands(inputs, INPUT_STAGES, config_path)
        for point in sweep.points_of(inputs):
            if state_of(point, last_stage).name == "done":
                print(f"# {point.name} is done")
                continue
            for link, target in links_of(point).items():
                print(shlex.join(["ln", "-s", str(target), str(link)]))
            _print_commands(point, sweep.stages, config_path)


def _print_commands(run: Run, stages: Sequence[Stage], config_path: Path) -> None:
    for stage in stages:
        print(shlex.join(["dpo-dist", stage.name, str(config_path), *run.overrides]))


def _run_stages(run: Run, stages: Sequence[Stage], config_path: Path) -> int:
    """Runs stages until one does not end well; its exit code."""
    console.rule(run.name, characters="=")
    for stage in stages:
        try:
            code = launch(stage, run.config, config_path, list(run.overrides))
        except RestartLimitError as error:  # of this run alone
            print_error(error)
            code = error.exit_code
        if not code:
            continue
        states = read_status(run.paths.status_path).get("stages", {})
        if states.get(stage.name, {}).get("state") in (None, "started", "running"):
            # its rank 0 was killed before it could say so
            update_stage(
                run.paths.status_path, stage.name, "failed",
                error=f"ended with exit code {code}", exit_code=code, restartable=True,
            )  # fmt: skip
        return code
    return 0
