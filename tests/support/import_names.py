"""Under which names a process has imported the files of tests/."""

import sys
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]


def import_names() -> dict[str, list[str]]:
    """Names by file; a second name of a file is a second copy of all it holds."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_relative_to(TESTS):
            names[Path(file).relative_to(TESTS).as_posix()].append(name)
    return dict(names)
