"""A stage as processes: a user's command starts the ranks, and a rank runs the stage."""

import contextlib
import gc
import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer

from dpo_dist.cli.output import leave, print_error
from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import EXIT_RESTART, ArtifactError, DPODistError, as_disk_error, is_transient
from dpo_dist.run import lock as run_lock
from dpo_dist.run import pipeline
from dpo_dist.run.attempts import begin, note_end, patiently, worth_another
from dpo_dist.run.local_ranks import count_workers, run_ranks
from dpo_dist.run.logs import console, dump_stacks_on_quit, hush_libraries, set_up_logging
from dpo_dist.run.manifest import write_atomic, write_json
from dpo_dist.run.run_dir import RunDir, rank_failure_path, rank_log_path
from dpo_dist.run.status import update_stage, update_status
from dpo_dist.run.stop_flag import Stopped
from dpo_dist.run.topology import from_environment, launched
from dpo_dist.watch import fault, watchdog
from dpo_dist.wording import counted

# To the end of the process: freeing what the frames of a failure hold, engines and profilers, may
# wait for ranks that do not fail.
_kept: list[BaseException] = []


def run_or_launch(stage: pipeline.Stage, config_path: Path, overrides: list[str]) -> RunConfig:
    """One rank of a launcher's job runs the stage; a user's command starts the ranks first."""
    config = load_config(config_path, overrides)
    if launched():
        _run_rank(stage, config)
    elif code := launch(stage, config, config_path, overrides):
        raise typer.Exit(code)
    return config


def launch(
    stage: pipeline.Stage, config: RunConfig, config_path: Path, overrides: list[str]
) -> int:
    """Runs a stage on this machine, and again after a hang or an error that passes; its exit code.

    Raises RestartLimitError at a cap.
    """
    paths = RunDir(config.run.dir)
    num_ranks, reason = count_workers(config.local) if stage.distributed else (1, "")
    ranks = f" on {counted(num_ranks, 'ranks')} ({reason})" if stage.distributed else ""
    argv, again = pipeline.stage_argv(stage.name, config_path, overrides), False
    while True:
        console.rule(f"{stage.name}: {stage.purpose}{ranks}", align="left")
        log_dir = patiently(partial(begin, paths, stage.name, config.restart, resubmitted=again))
        assert log_dir is not None
        patiently(lambda: write_atomic(paths.config_path, to_yaml(config)))
        code = run_ranks(argv, num_ranks, log_dir)
        if not code:
            return 0
        patiently(lambda: note_end(paths, stage.name))
        if not patiently(partial(worth_another, paths, stage.name, code)):
            return code
        again = True


def set_up_command() -> None:
    """Prepares this process for work that a user's command does by itself, on no other rank."""
    set_up_logging(0, None)
    hush_libraries()


def _run_rank(stage: pipeline.Stage, config: RunConfig) -> None:
    """Runs a stage as one rank and leaves the process with its exit code."""
    topology = from_environment()
    paths = RunDir(config.run.dir)
    attempt = paths.count_attempts(stage.name)
    log_dir = paths.log_dir(stage.name, attempt)
    part = config.reference.part
    # the parts of a reference pass run at the same time, each as a job of its own
    number = 0 if part is None else int(part.split("/")[0])
    set_up_logging(topology.rank, rank_log_path(log_dir, number) if attempt else None)
    log = dump_stacks_on_quit(topology.rank, rank_log_path(log_dir, number) if attempt else None)
    hush_libraries()
    lead = topology.rank == 0 and part is None  # a part is not the stage

    def tell_late(error: str, late: list[dict[str, Any]]) -> None:
        if part is None:
            update_status(paths.status_path, late=late)
            update_stage(
                paths.status_path, stage.name, "failed",
                error=error, exit_code=EXIT_RESTART, restartable=True, late=late,
            )  # fmt: skip

    watchdog.start(
        config.watchdog, topology.rank, topology.world_size,
        log=log.fileno(), note_path=paths.heartbeat_path if lead else None, tell=tell_late,
    )  # fmt: skip
    try:
        with run_lock.held(paths, stage.name) if lead else contextlib.nullcontext():
            noted = rank_failure_path(log_dir, topology.rank) if attempt and topology.rank else None
            code = _guarded(stage, config, paths, lead, noted)
    except ArtifactError as error:  # the folder is another job's, and so is its status.json
        print_error(error)
        code = EXIT_RESTART if error.transient else error.exit_code
    leave(code)


def _guarded(
    stage: pipeline.Stage, config: RunConfig, paths: RunDir, lead: bool, failure_path: Path | None
) -> int:
    def tell(state: str, **fields: Any) -> None:
        if lead:
            update_stage(paths.status_path, stage.name, state, **fields)

    def tell_end(state: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # what went wrong may be this folder
            tell(state, **fields)
            if failure_path is not None and state == "failed":
                write_json(failure_path, fields)

    logger = logging.getLogger("dpo_dist")
    try:
        fault.arm(from_environment().rank)
        tell("running")
        run = _imported(stage.name)
        artifact = run(config)
        tell("finished", artefact=str(artifact))
        return 0
    except Stopped as stopped:
        logger.info("%s; start the same command again to go on", stopped)
        tell_end("stopped", exit_code=EXIT_RESTART)
        return EXIT_RESTART
    except DPODistError as error:
        print_error(error)
        _add_to_log_file(f"error: {error}")
        code = EXIT_RESTART if error.transient else error.exit_code
        tell_end("failed", error=str(error), exit_code=code, restartable=error.transient)
        _kept.append(error)
        return code
    except BaseException as error:
        disk = as_disk_error(error)
        if disk is None:
            traceback.print_exc()
        else:
            print_error(disk)
        _add_to_log_file(traceback.format_exc())
        code = EXIT_RESTART if is_transient(error) else 1
        tell_end("failed", error=str(disk or repr(error)), exit_code=code, restartable=True)
        _kept.append(error)
        return code


def _imported(stage: pipeline.StageName) -> Callable[[RunConfig], Path]:
    """As `_import_run`, a fifth faster: the half million objects that come are looked at for
    garbage neither then nor later."""
    gc.disable()
    try:
        return _import_run(stage)
    finally:
        gc.freeze()
        gc.enable()


def _import_run(stage: pipeline.StageName) -> Callable[[RunConfig], Path]:
    """The stage's `run(config) -> path of its artifact`; imports no other stage."""
    match stage:
        case "doctor":
            from dpo_dist.stages.doctor import run
        case "prepare":
            from dpo_dist.stages.prepare import run
        case "reference":
            from dpo_dist.stages.reference import run
        case "train":
            from dpo_dist.stages.train import run
        case "export":
            from dpo_dist.stages.export import run
        case "verify":
            from dpo_dist.stages.verify import run
        case "push":
            from dpo_dist.stages.push import run
        case "evaluate":
            from dpo_dist.stages.evaluate import run
        case "generate":
            from dpo_dist.stages.generate import run
    return run


def _add_to_log_file(text: str) -> None:
    """For rank 0, whose stderr is the terminal and not its log."""
    for handler in logging.getLogger("dpo_dist").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.makeLogRecord({"msg": text, "levelno": logging.ERROR}))
