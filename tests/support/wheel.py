"""The wheel of this tree, and a venv that has it instead of the tree."""

import os
import subprocess
import sys
import venv
from pathlib import Path

from support.ranks import ROOT

HIDDEN = {"PYTHONPATH", "VIRTUAL_ENV"}  # would lead back to the tree


def run(*command: str | Path, cwd: Path, timeout_s: float = 120, **variables: str) -> str:
    """The standard output of a command in a folder that is not the repository; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=timeout_s,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"} | variables,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel into a folder; its path."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "-q", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def install_wheel(wheel: Path, folder: Path) -> Path:
    """bin/ of a venv with the wheel; it sees the libraries of this one, but not its dpo_dist."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    return folder / "bin"
