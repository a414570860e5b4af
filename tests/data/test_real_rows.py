"""Real preference rows of every format and a real model, from rows to a verified export."""

import json
import os
from pathlib import Path

import pytest
import yaml
from support.tiny_run import metrics_of, succeed_on

DATA = os.environ.get("DPO_DIST_REAL_DATA")
MODEL = os.environ.get("DPO_DIST_REAL_MODEL")
FILES = {
    "ultrafeedback_binarized": "ultrafeedback",
    "orca_dpo_pairs": "orca",
    "stack_exchange_paired": "stack_exchange",
    "llmbar": "standard",
}
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        DATA is None or MODEL is None, reason="DPO_DIST_REAL_DATA or DPO_DIST_REAL_MODEL is not set"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_all_formats_through_all_stages_with_smollm2(tmp_path: Path, stage: str) -> None:
    """The two shortest rows of each format, all of which are kept and trained on."""
    for name in FILES:
        rows = Path(f"{DATA}/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(sorted(rows, key=len)[:2]))
    config = {
        "run": {"dir": str(tmp_path / "out")},
        "model": {"path": MODEL, "dtype": "float32"},
        "data": {
            "train": [{"path": str(tmp_path / f"{name}.jsonl")} for name in FILES],
            "max_length": 320,
        },
        "adapter": {"rank": 4},
        "objective": {"beta": 0.1},
        "train": {
            "deepspeed": stage,
            "global_batch_size": 2,
            "micro_batch_tokens": 512,
            "learning_rate": 1e-4,
            "warmup_ratio": 0.0,
        },
        "checkpoint": {"probe_pairs": 2},
        "export": {"dtype": "float32", "max_shard_size_mib": 200},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    for name, num_ranks in (("prepare", 1), ("reference", 2), ("train", 2), ("export", 1)):
        succeed_on(num_ranks, name, path)
    succeed_on(1, "verify", path)

    report = json.loads((tmp_path / "out" / "pairs" / "report.json").read_text())
    sources = report["splits"]["train"]["sources"]
    assert {name: source["format"] for name, source in sources.items()} == FILES
    assert {source["pairs"] for source in sources.values()} == {2}
    steps = metrics_of(tmp_path / "out")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # two pairs each: all eight
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-3)  # the gate's ln 2
    assert steps[1]["rewards/margins"] != 0.0
    verified = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert verified["passed"] is True
    assert any((tmp_path / "out" / "tensorboard").iterdir())
