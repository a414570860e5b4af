"""Small sets of preference rows, prepared with a tiny tokenizer; and where the real ones are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_model
from support.tiny_tokenizer import MAX_VOCAB_SIZE, make_tokenizer

from dpo_dist.config.run_config import RunConfig, parse_config
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.stages import prepare

REAL_DATA = os.environ.get("DPO_DIST_REAL_DATA")
REAL_MODEL = os.environ.get("DPO_DIST_REAL_MODEL")
needs_real = pytest.mark.skipif(
    REAL_DATA is None or REAL_MODEL is None,
    reason="DPO_DIST_REAL_DATA or DPO_DIST_REAL_MODEL is not set",
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def orca_row(number: int, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    question = f"{WORDS[number % 10]} {WORDS[number // 10 % 10]} {number}"
    return {"system": "", "question": question, "chosen": chosen, "rejected": rejected}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder: Path, **settings: int) -> Path:
    """A tokenizer and a random model for it, with more in its config.json."""
    model_dir = make_tokenizer(folder / "model")
    tiny_model("llama", vocab_size=MAX_VOCAB_SIZE).save_pretrained(model_dir)
    config_path = model_dir / "config.json"
    config = json.loads(config_path.read_text())
    del config["max_position_embeddings"]
    config_path.write_text(json.dumps(config | settings))
    return model_dir


def make_config(folder: Path, **data: Any) -> RunConfig:
    """A run below `folder` on its train.jsonl and, where there is one, eval.jsonl."""
    model_dir = folder / "model"
    if not model_dir.exists():
        make_model(folder)
    for split in ("train", "eval"):
        if (path := folder / f"{split}.jsonl").exists():
            data.setdefault(split, [{"path": str(path)}])
    return parse_config(
        {
            "run": {"dir": str(folder / "out")},
            "model": {"path": str(model_dir)},
            "data": data,
            "train": {"global_batch_size": 1, "micro_batch_tokens": 1 << 20},
        }
    )


def pairs_of(config: RunConfig, split: str = "train") -> Pairs:
    return open_pairs(prepare.run(config), split)


def report_of(config: RunConfig) -> dict[str, Any]:
    return json.loads((prepare.run(config) / "report.json").read_text())
