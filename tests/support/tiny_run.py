"""A whole tiny run: random model, tiny tokenizer, seeded preference rows, and its run.yaml."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from support.commands import as_command
from support.ranks import started_ranks
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer

WORDS = [
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "sun",
    "moon",
    "tree",
    "river",
    "cold",
    "warm",
    "fast",
]
NUM_TRAIN, NUM_EVAL = 40, 10
SETTINGS: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "objective": {"beta": 0.5},
    "train": {
        "global_batch_size": 8,
        "micro_batch_tokens": 256,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        "gradient_checkpointing": False,
    },
    "checkpoint": {"every_steps": 4},
    "eval": {"every_steps": 5},
    "export": {"dtype": "float32"},
    "logging": {"tensorboard": False},
    "local": {"workers": 2},
    "data": {"max_length": 64, "num_workers": 1},
}


def make_run(folder: Path, family: str = "llama") -> Path:
    """Writes model/, train.jsonl, eval.jsonl and run.yaml (run.dir `out`); returns run.yaml."""
    model_dir = write_model(folder / "model", family)
    for split, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        write_rows(folder / f"{split}.jsonl", split, count)
    config = SETTINGS | {
        "run": {"dir": str(folder / "out")},
        "model": SETTINGS["model"] | {"path": str(model_dir)},
        "data": SETTINGS["data"]
        | {split: [{"path": str(folder / f"{split}.jsonl")}] for split in ("train", "eval")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_model(folder: Path, family: str = "llama") -> Path:
    """A random model and the tokenizer that fits it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder))
    model = tiny_model(family, vocab_size=len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, prefix: str, count: int, seed: int = 0) -> None:
    """Conversational pairs of random words; prompts are distinct for every prefix."""
    chance = random.Random(f"{prefix}{seed}")

    def words(low: int, high: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(low, high)))

    with path.open("w") as stream:
        for number in range(count):
            row = {
                "prompt": [{"role": "user", "content": f"{prefix} {number} {words(2, 8)}"}],
                "chosen": [{"role": "assistant", "content": words(2, 9)}],
                "rejected": [{"role": "assistant", "content": words(2, 9)}],
            }
            stream.write(json.dumps(row) + "\n")


def succeed_on(num_ranks: int, *arguments: str | Path, timeout_s: float = 400) -> str:
    """A stage as a launcher runs it, on ranks that need not import all anew; rank 0's output."""
    codes, output = _launched(num_ranks, arguments, timeout_s)
    assert set(codes) == {0}, f"{arguments}: exit {codes}\n{output}"
    return output


def fail_on(num_ranks: int, *arguments: str | Path) -> str:
    """As `succeed_on` for a stage that refuses its input; the error."""
    codes, output = _launched(num_ranks, arguments)
    assert set(codes) == {2}, f"{arguments}: exit {codes}\n{output}"
    return next(line for line in output.splitlines() if line.startswith("error: "))


def _launched(
    num_ranks: int, arguments: tuple[str | Path, ...], timeout_s: float = 400
) -> tuple[list[int], str]:
    with started_ranks(num_ranks, as_command, *map(str, arguments)) as ranks:
        results = ranks.wait(timeout_s, grace_s=15)
    return [result.exit_code for result in results], results[0].output


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock and on the layout."""
    clock = {
        "time", "pairs_per_second", "tokens_per_second", "tokens_per_second_per_gpu", "mfu",
        "peak_memory_gib",
    }  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def weights_of(run_dir: Path, step: int) -> dict[str, Any]:
    """The trained parameters in a checkpoint, whole."""
    from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint

    with open_checkpoint(run_dir / "checkpoints" / f"step-{step:06d}") as shards:
        return {name: shards.read(name) for name in shards.names_and_shapes}


def same_training(one: Path, other: Path, step: int) -> None:
    """Fails unless both runs have the same metrics and bit-equal weights."""
    assert metrics_of(one) == metrics_of(other)
    left, right = weights_of(one, step), weights_of(other, step)
    assert left.keys() == right.keys()
    different = [name for name in left if not bool((left[name] == right[name]).all())]
    assert not different, different
