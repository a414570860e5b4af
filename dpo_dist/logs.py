"""Log lines of a rank: the terminal for rank 0, a file for every rank; and progress bars."""

import logging
import sys
from pathlib import Path

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
    """Sends INFO lines of the `dpo_dist` loggers to the terminal (rank 0) and to the rank's file."""
    logger = logging.getLogger("dpo_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    if rank == 0:
        logger.addHandler(
            RichHandler(console=console, show_path=False, show_level=False, markup=False)
        )
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_path)
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(message)s"))
        logger.addHandler(handler)


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
