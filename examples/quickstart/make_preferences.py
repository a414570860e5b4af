"""Write preference pairs whose preference can be checked: answer, then offer the next step.

Each prompt holds a note and a question about it, so the right answer is always in sight. The chosen
answer says it in one sentence and closes with one short question to the user; the rejected answer
says the same and stops, remarks on it, or closes with a stock phrase. No network and no model: a
seed fixes both files, and no prompt is in both.

    python examples/quickstart/make_preferences.py --out data --seed 0 --train 256 --eval 64
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]
Row = dict[str, list[Message]]


@dataclass(frozen=True)
class Topic:
    """A kind of note with what can be asked and said about it; {slots} are filled from WORDS."""

    note: str
    question: str
    answer: str
    offers: tuple[str, ...]  # questions to the user: what the chosen answer closes with
    remarks: tuple[str, ...]  # statements of about the same length, for rejected answers


STOCK_PHRASES = (
    "Let me know if you have any other questions.",
    "Please let me know if you need anything else.",
    "I hope this helps.",
)

WORDS: dict[str, tuple[str, ...]] = {
    "city": (
        *("Paris", "Oslo", "Rome", "Madrid", "Vienna", "Lisbon", "Berlin", "Dublin", "Prague"),
        *("Athens", "Warsaw", "London", "Zurich", "Milan"),
    ),
    "color": ("red", "blue", "green", "yellow", "white", "black", "purple", "brown", "gray"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "dish": ("bread", "cake", "pie", "lasagna", "pizza", "casserole", "pudding"),
    "food": ("tea", "coffee", "rice", "sugar", "honey", "flour", "salt", "cheese", "chocolate"),
    "hour": ("6", "7", "8", "9", "10", "11"),
    "instrument": ("violin", "piano", "guitar", "flute", "cello", "trumpet", "harp", "clarinet"),
    "minutes": ("15", "20", "25", "30", "35", "40", "45", "50", "55"),
    "month": ("January", "March", "April", "May", "June", "July", "August", "October"),
    "number": ("2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"),
    "person": (
        *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jacob"),
        *("Laura", "Martin", "Nina", "Oscar", "Paula", "Rosa", "Samuel", "Tina", "Victor"),
    ),
    "place": (
        *("library", "museum", "swimming pool", "bakery", "bank", "pharmacy", "zoo", "theater"),
        *("gallery", "post office", "market", "aquarium", "castle", "garden"),
    ),
    "room": ("kitchen", "garage", "hallway", "office", "basement", "bedroom", "attic", "garden"),
    "subject": ("math", "history", "art", "music", "biology", "chemistry", "French", "geography"),
    "thing": (
        *("umbrella", "scarf", "camera", "backpack", "notebook", "jacket", "bicycle", "lamp"),
        *("suitcase", "guitar", "blanket", "bucket", "basket", "hat"),
    ),
}

TOPICS = (
    Topic(
        note="The {place} opens at {hour} am.",
        question="When does the {place} open?",
        answer="The {place} opens at {hour} am.",
        offers=("Would you like to know when it closes?", "Shall I show you the way?"),
        remarks=("It is usually quiet at that time.", "It is a good idea to come early."),
    ),
    Topic(
        note="A ticket to the {place} costs {number} dollars.",
        question="How much is a ticket to the {place}?",
        answer="A ticket to the {place} costs {number} dollars.",
        offers=("Shall I book one for you?", "Would you like to buy one now?"),
        remarks=("You can pay at the door.", "Many people buy one on the day."),
    ),
    Topic(
        note="{person} left the {thing} in the {room}.",
        question="Where is the {thing}?",
        answer="The {thing} is in the {room}.",
        offers=("Shall I bring it to you?", "Would you like me to call {person}?"),
        remarks=("It has been there for a while.", "You will see it when you go in."),
    ),
    Topic(
        note="The train to {city} leaves from platform {number}.",
        question="Which platform do I need for {city}?",
        answer="The train to {city} leaves from platform {number}.",
        offers=("Would you like to know when it leaves?", "Shall I book a seat for you?"),
        remarks=("It is usually on time these days.", "There is a sign in the main hall."),
    ),
    Topic(
        note="{person} has moved the meeting to {day}.",
        question="When is the meeting with {person}?",
        answer="The meeting is on {day}.",
        offers=("Shall I add it to your calendar?", "Would you like me to remind you?"),
        remarks=("It should not take a long time.", "Everyone has been told about it."),
    ),
    Topic(
        note="The parcel from {city} arrives on {day}.",
        question="When does the parcel from {city} arrive?",
        answer="The parcel from {city} arrives on {day}.",
        offers=("Will you be at home on that day?", "Would you like me to collect it?"),
        remarks=("It is not a very heavy parcel.", "You do not have to sign for it."),
    ),
    Topic(
        note="The soup needs {number} carrots and {minutes} minutes.",
        question="How many carrots do I need for the soup?",
        answer="You need {number} carrots for the soup.",
        offers=("Would you like to see the whole recipe?", "Shall I add them to your list?"),
        remarks=("It is best to wash them well first.", "You can cut them into small pieces."),
    ),
    Topic(
        note="{person} bought a {color} {thing}.",
        question="What color is the {thing} that {person} bought?",
        answer="The {thing} is {color}.",
        offers=("Would you like to have one too?", "Shall I show you a picture?"),
        remarks=("It is a very popular color.", "It looks very nice indeed."),
    ),
    Topic(
        note="{person} plays the {instrument}.",
        question="Which instrument does {person} play?",
        answer="{person} plays the {instrument}.",
        offers=("Would you like to learn it too?", "Do you play an instrument yourself?"),
        remarks=("It is a beautiful instrument.", "It takes a lot of practice to play well."),
    ),
    Topic(
        note="{person} is flying to {city} in {month}.",
        question="Where is {person} flying to?",
        answer="{person} is flying to {city}.",
        offers=("Have you ever been there?", "Would you like to know more about {city}?"),
        remarks=("It is a very popular city.", "There is a lot to see in {month}."),
    ),
    Topic(
        note="{person} teaches {subject} on {day}.",
        question="Who teaches {subject} on {day}?",
        answer="{person} teaches {subject} on {day}.",
        offers=("Would you like to join the class?", "Shall I tell you more about it?"),
        remarks=("The class is open to everyone.", "It is a popular class."),
    ),
    Topic(
        note="The {color} box holds the {food}.",
        question="Where can I find the {food}?",
        answer="The {food} is in the {color} box.",
        offers=("Would you like me to get it for you?", "Shall I bring the box to you?"),
        remarks=("You can take as much as you need.", "Please close the box afterward."),
    ),
    Topic(
        note="The {dish} bakes for {minutes} minutes.",
        question="How long does the {dish} bake?",
        answer="The {dish} bakes for {minutes} minutes.",
        offers=("Shall I set a timer for you?", "Would you like to see the recipe?"),
        remarks=("It will smell very good.", "Let it cool down for a bit."),
    ),
)


def follows_preference(answer: str) -> bool:
    """Whether `answer` closes with a question to the user."""
    return answer.strip().endswith("?")


def scenes(topic: Topic, rng: random.Random) -> Iterator[dict[str, str]]:
    """Every way to fill the slots of the topic's note, in random order, each once."""
    slots = [name for _, name, _, _ in string.Formatter().parse(topic.note) if name]
    fillings = list(itertools.product(*(WORDS[slot] for slot in slots)))
    rng.shuffle(fillings)
    return (dict(zip(slots, words, strict=True)) for words in fillings)


def make_row(topic: Topic, scene: dict[str, str], rng: random.Random) -> Row:
    """One pair as TRL's conversational row."""
    note, question, answer, offer, remark = (
        text.format(**scene)
        for text in (
            topic.note,
            topic.question,
            topic.answer,
            rng.choice(topic.offers),
            rng.choice(topic.remarks),
        )
    )
    closing = rng.choice(("", f" {remark}", f" {rng.choice(STOCK_PHRASES)}"))
    return {
        "prompt": [{"role": "user", "content": f"{note} {question}"}],
        "chosen": [{"role": "assistant", "content": f"{answer} {offer}"}],
        "rejected": [{"role": "assistant", "content": f"{answer}{closing}"}],
    }


def make_rows(seed: int, count: int) -> list[Row]:
    """`count` rows with different prompts, the topics taken in turn.

    Raises ValueError where a topic has too few scenes for its share of the rows.
    """
    rng = random.Random(seed)
    unused = [(topic, scenes(topic, rng)) for topic in TOPICS]
    rows: list[Row] = []
    for topic, fresh in itertools.islice(itertools.cycle(unused), count):
        scene = next(fresh, None)
        if scene is None:
            raise ValueError(
                f"{count} rows asked for, at most {len(rows)} distinct ones exist; "
                "lower --train or --eval, or add words to WORDS"
            )
        rows.append(make_row(topic, scene, rng))
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def positive(text: str) -> int:
    """Parse a count of at least 1 (ValueError otherwise)."""
    if (count := int(text)) < 1:
        raise ValueError
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and eval.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=positive, default=256, help="training pairs")
    parser.add_argument("--eval", type=positive, default=64, help="held-out pairs")
    options = parser.parse_args()
    try:
        rows = make_rows(options.seed, options.train + options.eval)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.out / "train.jsonl", rows[: options.train])
    write_jsonl(options.out / "eval.jsonl", rows[options.train :])
    print(f"{options.train} training and {options.eval} held-out pairs -> {options.out}")


if __name__ == "__main__":
    main()
