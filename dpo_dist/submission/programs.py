"""The programs that a scheduler starts: files of launch/ and slurm/, known here by their path."""

from pathlib import Path


def program(name: str) -> Path:
    """The path of `slurm/dpo.sh` or another: in a wheel inside the package, else beside it."""
    package = Path(__file__).absolute().parents[1]
    return next(p for p in (package / name, package.parent / name) if p.is_file())
