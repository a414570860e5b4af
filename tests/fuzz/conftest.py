"""How many examples are tried: few and always the same, or as many as `make fuzz` asks for."""

import os
import tempfile

import pytest
from fuzzing import TRIED
from hypothesis import HealthCheck, settings

ASKED = os.environ.get("DPO_DIST_FUZZ_EXAMPLES")  # of each test
SHORT = 10

# what Hypothesis knows of Unicode is kept there, not in this repository
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir() + "/dpo-dist-fuzz")
settings.register_profile(
    "dpo-dist",
    max_examples=int(ASKED or SHORT),
    derandomize=ASKED is None,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("dpo-dist")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if sum(TRIED.values()):
        terminalreporter.write_line(f"fuzz: {sum(TRIED.values()):,} examples were tried")
