"""Hub data sets end to end: the real client against a stand-in hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prepared import make_model
from support.ranks import ROOT
from support.servers.hub_server import Files, Hub, hub

from dpo_dist.data.pairs import Pairs, open_pairs

pytestmark = pytest.mark.timeout(300)
REPO = "org/prefs"
CARD = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: big
  data_files:
  - {split: train, path: big/*.jsonl}
---
"""


def rows(words: str, count: int) -> bytes:
    made = [{"question": f"{words} {n}", "chosen": "yes", "rejected": "no"} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def files(words: str) -> Files:
    return {
        "README.md": CARD,
        "small/train.jsonl": rows(f"{words} small train", 6),
        "small/test.jsonl": rows(f"{words} small test", 4),
        "big/0.jsonl": rows(f"{words} big first", 5),
        "big/1.jsonl": rows(f"{words} big second", 3000),
    }


def prepare(
    folder: Path, served: Hub, train: dict[str, Any], **data: Any
) -> subprocess.CompletedProcess[str]:
    """`dpo-dist prepare` in a process whose hub and cache are the test's."""
    if not (folder / "model").exists():
        make_model(folder)
    config = {
        "run": {"dir": str(folder / "out")},
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": REPO, **train}], "max_length": 128, "num_workers": 1, **data},
        "train": {"global_batch_size": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HTTP"))}
    environment |= {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-m", "dpo_dist", "prepare", str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=environment | {"COLUMNS": "1000", "HF_HUB_DISABLE_XET": "1"},
    )


def pairs_of(folder: Path, served: Hub, train: dict[str, Any], **data: Any) -> Pairs:
    done = prepare(folder, served, train, **data)
    assert done.returncode == 0, done.stdout + done.stderr
    return open_pairs(folder / "out" / "pairs", "train")


def questions(folder: Path, pairs: Pairs) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [str(tokenizer.decode(pairs.token_ids(index)[0])) for index in range(len(pairs))]
    return [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]


def data_files_in(folder: Path) -> list[str]:
    """What lies of the data set in the client's cache and in the run folder."""
    found = [path for path in folder.rglob("*") if path.suffix in (".jsonl", ".arrow", ".parquet")]
    return [str(path.relative_to(folder)) for path in found if path.is_file()]


def test_config_split_and_revision_are_those_asked_for(tmp_path: Path) -> None:
    with hub({REPO: {"main": files("new"), "v1": files("old")}}) as served:
        for train, expected in (
            ({"split": "test"}, [f"new small test {n}" for n in range(4)]),
            ({"config": "big", "limit": 6, "revision": "v1"},
             [*(f"old big first {n}" for n in range(5)), "old big second 0"]),
        ):  # fmt: skip
            folder = tmp_path / str(len(expected))
            folder.mkdir()
            pairs = pairs_of(folder, served, train)
            assert questions(folder, pairs) == expected
        assert pairs.origin(5) == f"{REPO}[train]:6"


@pytest.mark.slow
def test_a_stream_gives_the_same_pairs_and_keeps_no_rows(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("stored", "streamed")]
    with hub({REPO: {"main": files("new")}}) as served:
        found: list[Pairs] = []
        for folder, streaming in zip(folders, (False, True), strict=True):
            folder.mkdir()
            source = {"config": "big", "limit": 900, "weight": 0.5, "streaming": streaming}
            found.append(pairs_of(folder, served, source, eval_fraction=0.2, num_workers=2))
        stored, streamed = found
        assert stored.digest == streamed.digest and len(streamed) > 300
        assert [stored.origin(i) for i in (0, 9)] == [streamed.origin(i) for i in (0, 9)]
        held_out = [open_pairs(folder / "out" / "pairs", "eval") for folder in folders]
        assert held_out[0].digest == held_out[1].digest and len(held_out[1]) > 20
        assert any("hf/" in name for name in data_files_in(folders[0]))
        assert all(name.startswith("out/pairs/") for name in data_files_in(folders[1]))


@pytest.mark.slow
def test_the_same_commit_is_current_and_another_is_stale(tmp_path: Path) -> None:
    source = {"config": "big", "limit": 9, "streaming": True}
    with hub({REPO: {"main": files("new")}}) as served:
        for _ in range(2):
            done = prepare(tmp_path, served, source)
            assert done.returncode == 0
        assert "prepare: current" in done.stderr + done.stdout
        served.revisions[REPO]["main"]["big/0.jsonl"] = rows("newer", 5)
        stale = prepare(tmp_path, served, source)
        assert stale.returncode == 2 and "input data.train.0" in stale.stderr + stale.stdout


@pytest.mark.slow
def test_a_stream_pinned_to_a_commit_is_current_without_a_network(tmp_path: Path) -> None:
    with hub({REPO: {"main": files("new")}}) as served:
        source = {"split": "test", "streaming": True, "revision": served.commit(REPO, "main")}
        assert len(pairs_of(tmp_path, served, source)) == 4
        num_requests = len(served.requests)
        assert "prepare: current" in prepare(tmp_path, served, source).stderr
        assert len(served.requests) == num_requests


@pytest.mark.parametrize(
    "streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stored", "streamed"]
)
def test_what_the_hub_does_not_have(tmp_path: Path, streaming: bool) -> None:
    with hub({REPO: {"main": files("new")}}) as served:
        done = prepare(tmp_path, served, {"split": "tset", "streaming": streaming})
        assert done.returncode == 2
        said = " ".join((done.stdout + done.stderr).split())
        assert f"data.train.0.path '{REPO}' is no file here, and `datasets` loads no such" in said
        assert "tset" in said
        assert "the id, config and split of a hub data set. Correct data.train.0," in said
        assert not (tmp_path / "out" / "pairs").exists()


@pytest.mark.slow
def test_a_broken_row_of_a_stream_is_named(tmp_path: Path) -> None:
    broken = files("new")
    broken["small/train.jsonl"] += b'{"question": "q", "chosen": "yes"}\n'
    with hub({REPO: {"main": broken}}) as served:
        done = prepare(tmp_path, served, {"streaming": True})
    assert done.returncode == 2
    assert f"{REPO}[train]:7: field 'rejected' is null" in done.stderr + done.stdout
