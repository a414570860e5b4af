"""An optional package that is installed and does not import, for processes of their own."""

import os
from pathlib import Path

from support.ranks import ROOT

BROKEN = "flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"


def broken_package(folder: Path, name: str) -> dict[str, str]:
    """An environment in which `name` is found and raises what a build for another torch raises."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"raise ImportError({BROKEN!r})\n")
    metadata = folder / f"{name}-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (metadata.parent / "top_level.txt").write_text(f"{name}\n")
    places = (folder, ROOT, ROOT / "tests", ROOT / "launch")
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
