"""What a rank sees of the run folder, of the clock and of its host decides nothing alone.

Rank 1 is told the opposite of what is there, another day and another host. All files, names and
numbers are those of a run in which it is told the truth.
"""

import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import ROOT, run_ranks
from support.tiny_run import make_run, same_training, succeed_on

from dpo_dist.config.run_config import load_config
from dpo_dist.run.topology import from_environment

pytestmark = pytest.mark.timeout(900)
DAY_S = 86_400.0
QUESTIONS = ("exists", "is_file", "is_dir")  # the package asks by Path, as a test of it sees to


def lied_to(root: Path) -> None:
    """From now on the package gets wrong answers about everything in the folder `root`.

    Libraries that make sure of what they open get right ones.
    """

    def is_lied_to(path: Any) -> bool:
        asks = sys._getframe(2).f_globals["__name__"].startswith("dpo_dist.")
        return asks and isinstance(path, str | Path) and Path(path).is_relative_to(root)

    def opposite(own: Callable[..., bool]) -> Callable[..., bool]:
        def answer(path: Any, *args: Any, **kwargs: Any) -> bool:
            return own(path, *args, **kwargs) != is_lied_to(path)

        return answer

    for name in QUESTIONS:
        setattr(Path, name, opposite(getattr(Path, name)))
    listed, now = Path.glob, time.time

    def glob(path: Path, pattern: str, **kwargs: Any) -> Any:
        found = listed(path, pattern, **kwargs)
        return iter(()) if is_lied_to(path) else found

    Path.glob = glob
    time.time = lambda: now() - DAY_S
    socket.gethostname = lambda: "elsewhere"


def staged(run_yaml: str, out: str, stages: list[str], lies: bool) -> None:
    from dpo_dist.stages import reference, train

    config = load_config(Path(run_yaml), [f"run.dir={out}"])
    if lies and from_environment().rank == 1:
        lied_to(Path(out))
    for name in stages:
        {"reference": reference, "train": train}[name].run(config)


def test_the_package_asks_for_files_by_their_path() -> None:
    for path in (ROOT / "dpo_dist").rglob("*.py"):
        assert "os.path.exists" not in path.read_text(), path
        assert "os.path.is" not in path.read_text(), path


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.fault(
    11,
    "rank 1 sees the opposite of what is in the run folder, in the reference pass, in training "
    "and in a resume",
    becomes="rank 0 decides: the files, metrics and weights of a run that sees alike",
)
@pytest.mark.fault(
    12,
    "the clock of rank 1 is a day behind and its host has another name",
    becomes="the same files under the same names",
)
@pytest.mark.slow
def test_fault_11_and_12_one_rank_decides(tmp_path: Path) -> None:
    run_yaml = make_run(tmp_path)
    succeed_on(1, "prepare", run_yaml)
    outs = tmp_path / "out", tmp_path / "lied"
    shutil.copytree(*outs)
    for out, lies in zip(outs, (False, True), strict=True):
        run_ranks(2, staged, str(run_yaml), str(out), ["reference", "train"], lies, timeout_s=300)
        shutil.rmtree(out / "checkpoints" / "step-000010")
        run_ranks(2, staged, str(run_yaml), str(out), ["reference", "train"], lies, timeout_s=300)
    same_training(*outs, 10)
    assert files_of(outs[0]) == files_of(outs[1])
