"""The page of results of `make gpu`, written where DPO_DIST_GPU_RESULTS says."""

import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "flash-attn", "bitsandbytes")
rows: list[str] = []


def pytest_runtest_logreport(report: Any) -> None:
    if not report.nodeid.startswith("tests/gpu") or (report.when != "call" and report.passed):
        return
    reason = report.longrepr[2] if report.skipped else str(report.longrepr or "").splitlines()[-1:]
    said = "; ".join([f"{k} {v}" for k, v in report.user_properties]) or str(reason or "")
    name = report.nodeid.split("::")[-1]
    rows.append(f"| {name} | {report.outcome} | {said} | {report.duration:.1f} |")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("DPO_DIST_GPU_RESULTS")
    if path is None:
        return
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: _version(name) for name in PACKAGES} | {"CUDA": torch.version.cuda}
    page = [
        "# Acceptance run on GPUs", "", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "",
        f"Hardware: {', '.join(gpus) or 'no GPU: nothing below was shown on one'}", "",
        ", ".join(f"{name} {version}" for name, version in versions.items()), "",
        "| check | result | number or reason | seconds |", "| --- | --- | --- | --- |", *rows,
    ]  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(page) + "\n")
    print(f"\nwritten to {path}" + ("" if gpus else "; there is no GPU, so this is no acceptance"))
    if not gpus:
        session.exitstatus = 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
