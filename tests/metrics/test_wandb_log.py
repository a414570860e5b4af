"""Weights & Biases in offline mode: what arrives, what is kept back, and one run after a resume."""

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_config import RunConfig, parse_config
from dpo_dist.errors import ConfigError, HubError
from dpo_dist.metrics import wandb_log
from dpo_dist.metrics.writer import MetricsWriter

SECRET = "local-0123456789abcdef"


def config_for(folder: Path, **logging: Any) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": str(folder / "somebody" / "beta=0.1")},
            "model": {"path": "/home/somebody/models/base"},
            "data": {
                "train": [
                    {"path": "https://somebody:pass@host/rows.jsonl"},
                    {"path": f"s3://bucket/{SECRET}/rows.jsonl"},
                    {"path": "me/rows", "revision": "hf_abcdefghijklmnop"},
                ]
            },
            "slurm": {"options": ["--comment=private"]},
            "logging": {"wandb": True, **logging},
        }
    )


def records(folder: Path) -> list[Any]:
    """All records that were stored for a later upload: LevelDB's log format, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.rglob("*.wandb")):
        data, position, pending = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768  # a header does not cross the end of a block
            if left < 7:
                position += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, position)
            pending += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                record = Record()
                record.ParseFromString(pending)
                found.append(record)
                pending = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            line = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            lines.append({key: v for key, v in line.items() if key[:6] in ("train/", "eval/l")})
    return lines


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_SECRET_KEY_TOKEN", SECRET)


def train(config: RunConfig, first: int, last: int) -> None:
    run = wandb_log.start_run(config)
    path = config.run.dir / "metrics.jsonl"
    with MetricsWriter(path, None, resume_step=first - 1, wandb_run=run) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": 1 / step})
        writer.write(last, {"loss": 0.25}, "eval")


def test_metrics_arrive_and_a_resume_goes_on_in_the_same_run(offline: None, tmp_path: Path) -> None:
    config = config_for(tmp_path, wandb_project="ours", wandb_name="mine")
    train(config, 1, 2)
    time.sleep(1.1)  # offline folders are named by the second
    train(config, 2, 3)
    assert history(tmp_path) == [
        {"train/loss": 1.0}, {"train/loss": 0.5, "eval/loss": 0.25},
        {"train/loss": 0.5}, {"train/loss": 1 / 3, "eval/loss": 0.25},
    ]  # fmt: skip
    runs = [r.run for r in records(tmp_path) if r.WhichOneof("record_type") == "run"]
    kept = json.loads((config.run.dir / "wandb.json").read_text())["id"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(kept, "ours", "mine")}


@pytest.mark.fault(28, "a key, a user and a path beside W&B", becomes="not stored")
def test_nothing_private_is_stored(offline: None, tmp_path: Path) -> None:
    config = config_for(tmp_path)
    train(config, 1, 1)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    assert b"beta=0.1" in stored and b'"learning_rate"' in stored, "it would be empty otherwise"
    private = ("somebody", "pass@", SECRET, "hf_abcdef", "--comment", str(tmp_path), "/home")
    assert [text for text in private if text.encode() in stored] == []
    host = socket.gethostname().encode()  # as a whole string: a short one occurs in any bytes
    assert b'"' + host + b'"' not in stored and bytes([len(host)]) + host not in stored
    assert str(os.getcwd()).encode() not in stored


def test_what_is_redacted() -> None:
    values = {
        "id": "me/model", "rate": 5e-7, "none": None, "path": "/data/x/rows.jsonl",
        "relative": "runs/a/b", "list": ["../m", "zero3"], "url": "https://u:p@h/x",
        "token": "sk-abcdefghijk", "env": "key=12345678",
    }  # fmt: skip
    assert wandb_log.redact(values, {"12345678"}) == {
        "id": "me/model", "rate": 5e-7, "none": None, "path": "rows.jsonl", "relative": "b",
        "list": ["m", "zero3"], "url": "https://[redacted]@h/x", "token": "[redacted]",
        "env": "key=[redacted]",
    }  # fmt: skip


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as error:
        wandb_log.check_installed()
    assert str(error.value) == (
        "logging.wandb is set, and wandb is not installed; expected the extra `wandb`. "
        "pip install 'dpo-dist[wandb]', or set logging.wandb=false."
    )


def test_without_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.raises(HubError, match="Weights & Biases does not start a run .*expected a login"):
        wandb_log.start_run(config_for(tmp_path))


@pytest.mark.slow
def test_a_real_training_sends_its_metrics(offline: None, tmp_path: Path) -> None:
    from support.commands import succeed
    from support.tiny_run import make_run

    path = make_run(tmp_path)
    for stage in ("prepare", "reference"):
        succeed(stage, path)
    flags = ("logging.wandb=true", "logging.wandb_project=ours", "logging.wandb_name=mine")
    succeed("train", path, *flags, "train.max_steps=3")
    sent = [line["train/loss"] for line in history(tmp_path) if "train/loss" in line]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert sent == [line["loss"] for line in written if "loss" in line] and len(sent) == 3
