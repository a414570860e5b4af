"""Nothing that a row says is lost in silence: every text is in the tokens, or its loss is named."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.keys.data_settings import data_settings
from support.oracles.shipped_templates import templates
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.data.rows.formats import detect_format, read_pair
from dpo_dist.data.rows.messages import message
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair

TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}]  # fmt: skip


TEMPLATES = templates()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, to be loaded with each template."""
    return make_tokenizer(tmp_path_factory.mktemp("model"))


PROMPT, SCORED, READ = "prompt", "scored", "read"


@dataclass(frozen=True)
class Dialogue:
    """A row with words that occur once, and where each word has to be: in the prompt, or scored or
    read in the chosen answer."""

    fields: dict[str, Any]
    places: dict[str, str]


class Speaker:
    """Makes turns of words drawn from a generator, and remembers where they belong."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.place = PROMPT
        self.places: dict[str, str] = {}

    def word(self, place: str | None = None) -> str:
        word = "".join(self.draw.choices("abcdefghijklmnopqrstuvwxyz", k=9))
        self.places[word] = place or self.place
        return word

    def may(self) -> bool:
        return self.draw.random() < 0.4

    def says(self, role: str, place: str | None = None) -> dict[str, Any]:
        text = self.word(place)
        return {"role": role, "content": [{"type": "text", "text": text}] if self.may() else text}

    def answers(self) -> dict[str, Any]:
        thought = {"reasoning_content": self.word()} if self.may() else {}
        return self.says("assistant") | thought

    def calls(self, result_place: str | None = None) -> list[dict[str, Any]]:
        arguments: Any = {self.word(): self.word(), "days": 3}
        if self.may():
            arguments = json.dumps(arguments)
        calls = [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]
        call = {"role": "assistant", "content": None, "tool_calls": calls}
        if self.may():
            call["content"] = self.word()
        return [call, self.says("tool", result_place) | {"name": "get_weather"}]


def dialogues(seed: int, count: int) -> Iterator[Dialogue]:
    """Rows with system turns, tools, thoughts, parts, prefixes and answers of several turns."""
    for number in range(count):
        speaker = Speaker(random.Random(f"{seed} {number}"))
        with_tools = speaker.may()
        first = [speaker.draw.choice(["system", "developer"])] if speaker.may() else []
        prompt = [speaker.says(role) for role in first]
        for last in [False] * speaker.may() + [True]:
            prompt.append(speaker.says("user"))
            if with_tools and speaker.may():
                prompt += speaker.calls()
            if not last:
                prompt.append(speaker.answers())
        if speaker.may() and prompt[-1]["role"] == "user":
            prompt.append({"role": "assistant", "content": speaker.word()})  # to be continued
        speaker.place, answer = SCORED, []
        for _ in range(speaker.draw.choice([0, 0, 1, 2])):
            if with_tools:
                answer += speaker.calls(READ)
            else:
                answer += [speaker.answers(), speaker.says("user", READ)]
        answer.append(speaker.answers())
        rejected = [{"role": "assistant", "content": "no"}]
        fields = {"prompt": prompt, "chosen": answer, "rejected": rejected}
        yield Dialogue(fields | ({"tools": TOOLS} if with_tools else {}), speaker.places)


def pair_of(fields: dict[str, Any]) -> Pair:
    row = Row(fields, "rows.jsonl:7")
    pair = read_pair(row, detect_format(row, "data.train.0"), "rows")
    assert isinstance(pair, Pair)
    return pair


def outcome(pairs: PairTokenizer, dialogue: Dialogue) -> str:
    """Whether a dialogue is whole, lost text, or is refused; fails where a word is elsewhere."""
    pair = pair_of(dialogue.fields)
    (found,) = pairs.encode([pair])
    if isinstance(found, TemplateRefusal):
        return "refused"
    parts = {
        PROMPT: found.prompt_ids,
        SCORED: [token for token in found.chosen_ids if token >= 0],
        READ: [~token for token in found.chosen_ids if token < 0],
    }
    texts = {place: pairs.tokenizer.decode(ids) for place, ids in parts.items()}
    lost = pairs.lost(pair)
    assert bool(lost) == (found.lost is not None)
    counted = {word for word in dialogue.places if any(word in part.text for part in lost)}
    for word, place in dialogue.places.items():
        assert word in counted or word in texts[place], (word, dialogue, texts)
    # what is there and counts as lost stands before what the row has before it
    answer = [token if token >= 0 else ~token for token in found.chosen_ids]
    text = pairs.tokenizer.decode(found.prompt_ids + answer)
    places = [text.find(word) for word in dialogue.places if word in text]
    assert not any(word in text for word in counted) or places != sorted(places), (lost, text)
    return "lost" if lost else "whole"


@pytest.mark.parametrize(
    "count", [pytest.param(12, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_text_is_scored_read_or_counted_as_lost(
    name: str, count: int, model_dir: Path
) -> None:
    pairs = PairTokenizer(load_tokenizer(model_dir, TEMPLATES[name]), data_settings())
    outcomes = {outcome(pairs, dialogue) for dialogue in dialogues(0, count)}
    # templates of vision models write parts of a message only, so a text is named as lost
    assert ("whole" in outcomes) != name.startswith(("idefics", "llava", "smolvlm")), outcomes


def test_a_prompt_that_a_template_rewrites_is_not_scored(model_dir: Path) -> None:
    """Qwen3 opens a last turn with an empty thought; gpt-oss drops what was said beside a call."""

    def encoded(name: str, prompt: list[Any], answer: list[Any]) -> TokenPair | TemplateRefusal:
        pairs = PairTokenizer(load_tokenizer(model_dir, TEMPLATES[name]), data_settings())
        rejected = [message("assistant", "no")]
        pair = pair_of({"prompt": prompt, "chosen": answer, "rejected": rejected, "tools": TOOLS})
        return pairs.encode([pair])[0]

    user, begun, last = message("user", "what"), message("assistant", "begun"), [
        message("assistant", "last")
    ]  # fmt: skip
    arguments = {"city": "rome"}
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]
    called = [begun | {"tool_calls": calls}, {"role": "tool", "name": "f", "content": "sunny"}]
    turns = [message("assistant", " first"), message("user", "go on"), *last]
    for name, prompt, answer in (
        ("qwen3", [user, begun], turns),
        ("gptoss_training", [user, *called], last),
    ):
        found = encoded(name, prompt, answer)
        assert isinstance(found, TemplateRefusal)
        assert str(found) == "it renders the prompt otherwise before an answer"
    assert isinstance(encoded("qwen3", [user, begun], last), TokenPair)
    assert isinstance(encoded("qwen3", [user, *called], last), TokenPair)
    # a template without tools, whose name the answer's call has
    call = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert isinstance(encoded("deepseekv3_training", [user], call), TokenPair)
