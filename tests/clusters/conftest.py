"""What the runs on clusters are compared with: the same run on this machine."""

from pathlib import Path

import pytest
from cluster_runs import LONG, scored_copy
from support.tiny_run import make_run, succeed_on


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on two ranks: the folder of its run.yaml."""
    folder = tmp_path_factory.mktemp("local")
    path = make_run(folder)
    succeed_on(1, "prepare", path)
    succeed_on(2, "reference", path)
    succeed_on(2, "train", path)
    return folder


@pytest.fixture(scope="session")
def unbroken(local: Path) -> Path:
    """A long training run on the local run's pairs and reference that nothing stopped."""
    out = scored_copy(local, local / "unbroken")
    succeed_on(2, "train", local / "run.yaml", *LONG, f"run.dir={out}")
    return out
