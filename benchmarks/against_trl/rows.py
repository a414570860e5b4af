"""The rows that every system gets: texts, and the token ids that TRL makes of them.

Made-up texts are words of one token each, so that a prompt has as many tokens as it should.
Answers are half to one and a half times as long as their mean, by a seed.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.against_trl.cases import Rows
from dpo_dist.data.shared_parts import SharedParts

Text = dict[str, str]  # prompt, chosen, rejected
PairIds = tuple[list[int], list[int], list[int]]
WARM_UP_WORDS = 8


def make_texts(rows: Rows, tokenizer: Any, real: Path | None) -> list[Text]:
    """The pairs of a step; all pairs of a prompt follow each other."""
    if rows.share is None:
        assert real is not None, "real rows need DPO_DIST_REAL_DATA"
        return list(itertools.islice(_real_texts(real, tokenizer, rows.length), rows.pairs))
    words, chance = _words(tokenizer), random.Random(rows.share)
    num_prompt = round(rows.length * rows.share / 100)
    texts: list[Text] = []
    for _ in range(rows.prompts):
        prompt = "".join(chance.choices(words, k=num_prompt))
        mean = rows.length - num_prompt
        counts = [max(2, round(mean * chance.uniform(0.5, 1.5))) for _ in range(rows.answers)]
        answers = [
            "".join(chance.choices(words, k=count - 1)) + tokenizer.eos_token for count in counts
        ]
        texts += [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in itertools.combinations(answers, 2)
        ]
    return texts


def warm_up_texts(count: int, tokenizer: Any) -> list[Text]:
    """Short pairs for the first step, in which allocators and threads start."""
    words, chance = _words(tokenizer), random.Random(1)

    def text() -> str:
        return "".join(chance.choices(words, k=WARM_UP_WORDS))

    names = ("prompt", "chosen", "rejected")
    texts = [{name: text() for name in names} for _ in range(count)]
    end = tokenizer.eos_token
    return [row | {name: row[name] + end for name in names[1:]} for row in texts]


def _words(tokenizer: Any) -> list[str]:
    """Words that stay one token wherever they stand: their space begins a new one."""
    ids = range(1000, 3000) if len(tokenizer) > 3000 else range(3, len(tokenizer))
    words = [tokenizer.decode([token]) for token in ids]
    words = [word if word.startswith(" ") else f" {word}" for word in words]
    kept = [word for word in words if word[1:].isascii() and word[1:].isalnum()]
    sure = [w for w in kept if len(tokenizer(w * 2, add_special_tokens=False).input_ids) == 2]
    return sure[:500]


def _real_texts(data: Path, tokenizer: Any, longest: int) -> Iterator[Text]:
    """Rendered dialogues; as TRL does, those are left out whose prompt alone is `longest`."""
    with (data / "ultrafeedback_binarized.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            dialogues = [row[name] for name in ("chosen", "rejected")]
            prompt, *answers = (
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=last)
                for messages, last in ((dialogues[0][:-1], True), *((d, False) for d in dialogues))
            )
            short = len(tokenizer(prompt, add_special_tokens=False).input_ids) < longest
            if short and all(answer.startswith(prompt) for answer in answers):
                chosen, rejected = (_ended(answer[len(prompt) :], tokenizer) for answer in answers)
                yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _ended(answer: str, tokenizer: Any) -> str:
    """Up to the token that ends it, without what a template writes behind."""
    end = tokenizer.eos_token
    return answer[: answer.rindex(end) + len(end)] if end in answer else answer + end


def token_ids(texts: Sequence[Text], tokenizer: Any, max_length: int) -> list[PairIds]:
    """As TRL tokenizes such texts, and as its collator cuts them."""
    pairs: list[PairIds] = []
    for row in texts:
        prompt = tokenizer(row["prompt"]).input_ids
        answers = [
            tokenizer(row["prompt"] + row[name]).input_ids for name in ("chosen", "rejected")
        ]
        for ids in answers:
            assert ids[: len(prompt)] == prompt, "a prompt that its answer changes"
        chosen, rejected = (ids[len(prompt) : max_length] for ids in answers)
        pairs.append((prompt, chosen, rejected))
    return pairs


def longest(pairs: Sequence[PairIds]) -> int:
    """Tokens of the longest sequence, a prompt with an answer."""
    return max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs)


def shared_parts(pairs: Sequence[PairIds]) -> SharedParts:
    """What the pairs have in common, as the prepare stage would tell."""
    numbers: dict[Any, int] = {}
    names = [
        (tuple(prompt), (tuple(prompt), tuple(chosen)), (tuple(prompt), tuple(rejected)))
        for prompt, chosen, rejected in pairs
    ]
    parts = np.array(
        [[numbers.setdefault(name, len(numbers)) for name in row] for row in names], dtype=np.uint64
    )
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])
    return SharedParts(len(pairs), lambda indices: parts[indices], lambda indices: lengths[indices])
