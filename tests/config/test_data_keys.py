"""Keys of `data`: each is flipped, and `prepare` makes other pairs, or makes them otherwise."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.keys.flips import Flip, assert_effect
from support.prepared import make_model, orca_row, write_jsonl
from support.servers.hub_server import Files, hub, read_from

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import epoch_permutation
from dpo_dist.data.pairs import SPLITS, open_pairs
from dpo_dist.errors import DataError
from dpo_dist.stages import prepare

REPO = "org/prefs"
MANY_DROPPED = {"data.max_dropped": 0.9}
BAD = {"data.train": [{"path": "bad.jsonl"}]}
DEAF = {"data.chat_template": "own.jinja", "data.system_message": "Be brief."}
OWN_TEMPLATE = """
{%- for turn in messages if turn.role != 'system' -%}
<|im_start|>{{ turn.role }}
{{ turn.content }}{{ '!' if loud else '' }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
CARD = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: big
  data_files:
  - {split: train, path: big.jsonl}
---
"""


def pairs_of(config: RunConfig) -> Any:
    """The token ids of all pairs, with their sources."""
    folder, made = prepare.run(config), {}
    for split in SPLITS:
        pairs = open_pairs(folder, split)
        ids = [tuple(map(tuple, pairs.token_ids(index))) for index in range(len(pairs))]
        made[split] = list(zip(pairs.sources.tolist(), ids, strict=True))
    return made


def refusal_of(config: RunConfig) -> str:
    """Why there are no pairs, "" when there are."""
    try:
        prepare.run(config)
    except DataError as error:
        return str(error)
    return ""


def rows_kept_on_disk(config: RunConfig) -> int:
    """Files of rows in the cache of `datasets` that making the pairs leaves there."""
    import datasets

    cache = config.run.dir.with_suffix(".cache")
    datasets.config.HF_DATASETS_CACHE = cache
    prepare.run(config)
    return len(list(cache.rglob("*.arrow")))


def processes_of(config: RunConfig) -> str:
    """The processes that tokenized, as the log says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger, level = logging.getLogger("dpo_dist"), logging.getLogger("dpo_dist").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        prepare.run(config)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (line,) = (line for line in lines if "rows tokenized" in line)
    return line.rpartition(", ")[2]


def order_of(config: RunConfig) -> list[int]:
    """The pairs of the first epoch."""
    pairs = open_pairs(prepare.run(config), "train")
    together = pairs.together(config.data.order)
    return epoch_permutation(len(pairs), config.run.seed, 0, together).tolist()


def source_flips(split: str) -> Iterator[Flip]:
    """Every key of a source, in one of the two lists."""
    for key, value in (
        ("path", "other.jsonl"),
        ("name", "mine"),
        ("format", "alpaca"),
        ("columns", {"question": "instruction"}),
        ("limit", 3),
        ("weight", 0.5),
    ):
        yield Flip(f"data.{split}[].{key}", value, pairs_of)
    yield Flip(f"data.{split}[].min_score_margin", 1.0, pairs_of, MANY_DROPPED)
    ranked = {f"data.{split}[].path": "ranked.jsonl"}
    yield Flip(f"data.{split}[].pairs", "all", pairs_of, ranked | MANY_DROPPED)
    from_hub = {f"data.{split}[].path": REPO}
    for key, value in (("config", "big"), ("split", "test"), ("revision", "v1")):
        yield Flip(f"data.{split}[].{key}", value, pairs_of, from_hub)
    yield Flip(f"data.{split}[].streaming", True, rows_kept_on_disk, from_hub)


FLIPS = [
    *source_flips("train"),
    *source_flips("eval"),
    Flip("data.train", [{"path": "train.jsonl"}, {"path": "other.jsonl"}], pairs_of),
    Flip("data.eval", [], pairs_of),
    Flip("data.eval_fraction", 0.4, pairs_of, MANY_DROPPED),
    Flip("data.eval_seed", 1, pairs_of, MANY_DROPPED | {"data.eval_fraction": 0.4}),
    Flip("data.max_length", 24, pairs_of),
    Flip("data.chat_template", "zephyr", pairs_of),
    Flip("data.system_message", "Be brief.", pairs_of),
    Flip(
        "data.chat_template_kwargs", {"loud": True}, pairs_of, {"data.chat_template": "own.jinja"}
    ),
    Flip("data.on_bad_row", "drop", refusal_of, BAD),
    Flip("data.max_bad_rows", 0.2, refusal_of, BAD | {"data.on_bad_row": "drop"}),
    Flip("data.on_lost_text", "keep", refusal_of, DEAF),
    Flip("data.allow_lost", ["content"], refusal_of, DEAF),
    Flip("data.on_empty", "keep", pairs_of),
    Flip("data.on_identical", "keep", pairs_of),
    Flip("data.on_prompt_fills", "raise", refusal_of),
    Flip("data.on_duplicate", "keep", pairs_of),
    Flip("data.on_conflict", "keep", pairs_of),
    Flip("data.on_overlap", "keep", pairs_of),
    Flip("data.leave_out", ["ab" * 16], refusal_of),
    Flip("data.max_dropped", 0.1, refusal_of),
    Flip("data.num_workers", 2, processes_of),
    Flip(
        "data.order",
        "prompts",
        order_of,
        MANY_DROPPED | {"data.train[].path": "ranked.jsonl", "data.train[].pairs": "all"},
    ),
]


def hub_files(word: str) -> Files:
    def rows(name: str, count: int) -> bytes:
        made = [orca_row(200 + n, chosen=f"{word} {name}") for n in range(count)]
        return "".join(json.dumps(row) + "\n" for row in made).encode()

    return {
        "README.md": CARD,
        "small/train.jsonl": rows("train", 4),
        "small/test.jsonl": rows("test", 4),
        "big.jsonl": rows("big", 4),
    }


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on rows of which one breaks every rule, in the folder where its tests run."""
    folder = tmp_path_factory.mktemp("data")
    make_model(folder)

    def row(number: int, **changes: Any) -> dict[str, Any]:
        scores = {"chosen_score": number % 3 + 0.5, "rejected_score": 0.0}
        made = orca_row(number, f"yes {number}", f"no {number}")
        return made | {"instruction": f"Say {number}."} | scores | changes

    for name, first in (("train", 0), ("eval", 50), ("other", 80)):
        plain = [row(number) for number in range(first, first + 8)]
        swapped = row(first + 1, chosen=f"no {first + 1}", rejected=f"yes {first + 1}")
        broken = [
            row(first + 10, chosen=""),
            row(first + 11, rejected=f"yes {first + 11}"),
            row(first),
            swapped,
            row(first + 12, question="so " * 200),
        ]
        write_jsonl(folder / f"{name}.jsonl", [*plain, *broken, *([row(2)] if first else [])])
    bad = [row(number, **({"chosen": 1} if number == 3 else {})) for number in range(10)]
    write_jsonl(folder / "bad.jsonl", bad)
    answers = {"responses": ["one", "two", "three"], "scores": [3, 1, 2]}
    write_jsonl(folder / "ranked.jsonl", [{"prompt": f"Say {n}."} | answers for n in range(4)])
    (folder / "own.jinja").write_text(OWN_TEMPLATE)
    path = folder / "run.yaml"
    sources = {split: [{"path": f"{split}.jsonl"}] for split in SPLITS}
    data = sources | {"max_length": 64, "num_workers": 1}
    run = {"run": {"dir": "out"}, "model": {"path": "model"}, "data": data}
    run["train"] = {"global_batch_size": 1}
    path.write_text(yaml.safe_dump(run))
    revisions = {"main": hub_files("new"), "v1": hub_files("old")}
    with pytest.MonkeyPatch.context() as patch, hub({REPO: revisions}) as served:
        patch.chdir(folder)
        read_from(served, folder, patch)
        yield path


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_data(flip: Flip, run_yaml: Path) -> None:
    assert_effect(flip, run_yaml)
