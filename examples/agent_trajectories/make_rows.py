"""Write preferences between an agent's trajectories: look it up in the right place, then answer.

Each question asks how many of something a store has. The chosen trajectory calls the tool for that
store and says what it was told. The rejected one guesses without a call, or asks about another
store. A seed fixes both files, and no question is in both.

    python examples/agent_trajectories/make_rows.py --out runs/agent/data --seed 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

ITEMS = (
    "apples", "bricks", "candles", "drums", "envelopes", "forks", "gloves", "hammers", "kettles",
    "lamps", "mugs", "nails",
)  # fmt: skip
STORES = ("Athens", "Berlin", "Dublin", "Lisbon", "Madrid", "Oslo", "Prague", "Rome", "Vienna")
TOOL = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "How many of an item a store has.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string"}, "store": {"type": "string"}},
            "required": ["item", "store"],
        },
    },
}
Row = dict[str, Any]


def make_rows(seed: int, count: int) -> list[Row]:
    """`count` rows, each about another item and store."""
    chance = random.Random(seed)
    asked = list(itertools.product(ITEMS, STORES))
    chance.shuffle(asked)
    if count > len(asked):
        raise ValueError(f"{count} rows; expected at most {len(asked)}, one an item and store")
    return [_row(chance, item, store) for item, store in asked[:count]]


def _row(chance: random.Random, item: str, store: str) -> Row:
    number, other_store = chance.randint(2, 99), chance.choice(STORES)
    prompt = [{"role": "user", "content": f"How many {item} are there in {store}?"}]
    looked_up = [*_call(item, store, number), _answer(f"There are {number} {item} in {store}.")]
    if other_store == store:
        wrong = [_answer(f"There are {chance.randint(2, 99)} {item} in {store}.")]
    else:
        told = chance.randint(2, 99)
        wrong = [
            *_call(item, other_store, told), _answer(f"There are {told} {item} in {store}."),
        ]  # fmt: skip
    if chance.random() < 0.5:
        wrong = wrong[-1:]
    return {"prompt": prompt, "chosen": looked_up, "rejected": wrong, "tools": [TOOL]}


def _call(item: str, store: str, number: int) -> list[Row]:
    function = {"name": "stock", "arguments": {"item": item, "store": store}}
    told = json.dumps({"item": item, "store": store, "stock": number})
    return [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "stock", "content": told},
    ]


def _answer(text: str) -> Row:
    return {"role": "assistant", "content": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=80)
    parser.add_argument("--eval", type=int, default=24)
    args = parser.parse_args()
    rows = make_rows(args.seed, args.train + args.eval)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[: args.train]), ("eval", rows[args.train :])):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path}: {len(part)} pairs")


if __name__ == "__main__":
    main()
