"""Log lines of a rank: the terminal for rank 0, a file for every rank; stacks; progress bars."""

import faulthandler
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)


def set_up_logging(rank: int, log_path: Path | None) -> None:
    """Sends INFO lines of the `dpo_dist` loggers to stderr; rank 0's also to `log_path`.

    The launcher gives every other rank its file as stderr.
    """
    logger = logging.getLogger("dpo_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    plain = logging.Formatter(f"%(asctime)s rank {rank} %(message)s")
    if rank == 0:
        logger.addHandler(
            RichHandler(console=console, show_path=False, show_level=False, markup=False)
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(plain)
        logger.addHandler(handler)
    if rank == 0 and log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_path)
        handler.setFormatter(plain)
        logger.addHandler(handler)


def dump_stacks_on_quit(rank: int, log_path: Path | None) -> TextIO:
    """SIGQUIT writes the Python stack of every thread into the rank's log, which is returned open;
    the rank goes on.

    To see where a run hangs: Ctrl-\\ on this machine, `scancel --signal=QUIT JOB` under Slurm.
    """
    stream = log_path.open("a") if rank == 0 and log_path is not None else sys.stderr
    faulthandler.register(signal.SIGQUIT, file=stream, all_threads=True)
    return stream


def hush_libraries() -> None:
    """Keeps other libraries' bars, banners and deprecation notes out of a run's terminal.

    Their warnings and errors stay, but for one: bitsandbytes, which peft imports, misses a kernel
    for 4-bit models on CPUs in every process. Has to come before they are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


class RateColumn(ProgressColumn):
    """Finished units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s")


def progress_bar(unit: str, enabled: bool = True) -> Progress:
    """A bar with done/total, units a second, time gone and time left; silent off a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not enabled or not sys.stderr.isatty(),
    )
