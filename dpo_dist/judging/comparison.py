"""Pairwise judging: the question to the judge, its verdict, and what many verdicts add up to.

Two answers are shown in both orders. They win only when both orders say so; anything else that
both orders decide is a tie, as in MT-Bench (Zheng et al. 2023, arXiv:2306.05685).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpo_dist.run.manifest import digest_of

Order = Literal[1, 2]  # 1: the first file's answer is shown as A
Winner = Literal["first", "second", "tie"]
Outcome = Literal["win", "loss", "tie", "changed", "error"]  # of the first file

SYSTEM_PROMPT = (
    "You compare two AI assistants. You are shown what a user wrote and how assistant A and "
    "assistant B replied. Decide whose replies serve the user better: correct first of all, then "
    "to the point, complete, clear, and as harmless as the request allows. A longer reply is not "
    "a better one. Which assistant is shown first says nothing about either. Give your reasons in "
    "a few sentences. Then end with your verdict on a line of its own: [[A]], [[B]], or [[C]] "
    "when neither is better."
)
LAST_TURN_NOTE = "Judge the replies to the user's last message; what comes before is context.\n\n"
REMINDER = "That names no single verdict. Write only [[A]], [[B]] or [[C]]."
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
_LETTER_ALONE = re.compile(r"[\W_]*([ABC])[\W_]*", re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
Z_95 = 1.959964  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Dialogue:
    """What a user wrote, and what one model said to it up to a turn."""

    opening: str  # the prompt, its earlier messages included
    follow_ups: tuple[str, ...]
    answers: tuple[str, ...]  # one more than follow_ups

    def shown(self, name: str) -> str:
        """The dialogue as the judge reads it."""
        assert len(self.answers) == len(self.follow_ups) + 1, (self.answers, self.follow_ups)
        parts = [f"### Assistant {name} replies\n{self.answers[0]}"]
        for said, reply in zip(self.follow_ups, self.answers[1:], strict=True):
            parts += [f"### The user writes\n{said}", f"### Assistant {name} replies\n{reply}"]
        return "\n\n".join(parts)


def judge_messages(shown_as_a: Dialogue, shown_as_b: Dialogue) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict; both dialogues have the same user turns."""
    later = LAST_TURN_NOTE if shown_as_a.follow_ups else ""
    text = (
        f"{later}## The user's message\n{shown_as_a.opening}\n\n"
        f"## The dialogue with assistant A\n{shown_as_a.shown('A')}\n\n"
        f"## The dialogue with assistant B\n{shown_as_b.shown('B')}\n\n"
        "## Your reasons and your verdict"
    )
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]


def request_digest(
    messages: Sequence[Mapping[str, str]], judge_model: str, settings: Mapping[str, Any]
) -> str:
    """Identity of a verdict: judge, sampling, prompt, and both answers in order."""
    return digest_of([list(map(dict, messages)), judge_model, dict(settings)])


def parse_verdict(reply: str) -> str | None:
    """A, B or C when the reply names exactly one of them in double brackets, or is one; else None.

    What a reasoning model thinks aloud does not count, also where it was cut before the end of a
    thought. A reply that repeats the choices names several: taking one of those would make a
    verdict of a quotation.
    """
    said = _THOUGHT.sub("", reply)
    if alone := _LETTER_ALONE.fullmatch(said):
        return alone.group(1).upper()
    named = {letter.upper() for letter in _VERDICT.findall(said)}
    return named.pop() if len(named) == 1 else None


def winner_of(verdict: str, order: Order) -> Winner:
    """Whose answer a verdict prefers, given who was shown as A."""
    if verdict == "C":
        return "tie"
    return "first" if (verdict == "A") == (order == 1) else "second"


def outcome_of(forward: Winner | None, backward: Winner | None) -> Outcome:
    """What two orders say together; `changed` is a tie that came of disagreement."""
    if forward is None or backward is None:
        return "error"
    if forward != backward:
        return "changed"
    kinds: dict[Winner, Outcome] = {"first": "win", "second": "loss", "tie": "tie"}
    return kinds[forward]


@dataclass(frozen=True)
class Tally:
    """Outcomes counted; `tie` includes `changed`, and errors are in no rate."""

    win: int
    loss: int
    tie: int
    changed: int
    error: int
    num_questions: int  # with an outcome that is no error; their turns are not independent

    @property
    def n(self) -> int:
        return self.win + self.loss + self.tie

    @property
    def win_rate_adjusted(self) -> float:
        """A tie counts as half a win: (win + tie / 2) / n, as FastChat's show_result has it."""
        return (self.win + 0.5 * self.tie) / self.n

    def row(self) -> dict[str, float]:
        """The numbers of the table; needs at least one outcome."""
        return {
            "win": self.win, "loss": self.loss, "tie": self.tie,
            "win_rate": self.win / self.n, "loss_rate": self.loss / self.n,
            "win_rate_adjusted": self.win_rate_adjusted,
        }  # fmt: skip

    def turned_round(self) -> "Tally":
        """The same seen from the other file."""
        return Tally(**asdict(self) | {"win": self.loss, "loss": self.win})

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of win_rate_adjusted over the questions.

        Wilson 1927, doi:10.1080/01621459.1927.10502953. With ties it is a little too wide: a half
        varies less than a coin.
        """
        p, n, z = self.win_rate_adjusted, self.num_questions, Z_95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def arithmetic(self) -> list[str]:
        """Lines that say where the numbers come from."""
        low, high = self.interval()
        return [
            f"tie {self.tie} = {self.tie - self.changed} said in both orders + {self.changed} "
            "where the orders disagreed",
            f"win_rate_adjusted = (win {self.win} + 0.5 x tie {self.tie}) / n {self.n} = "
            f"{self.win_rate_adjusted:.4f}",
            f"95 % interval {low:.4f} .. {high:.4f} (Wilson, p {self.win_rate_adjusted:.4f}, "
            f"n {self.num_questions} questions, z 1.96)",
        ]


def tally(outcomes: Iterable[tuple[Any, Outcome]]) -> Tally:
    """Counts (question id, outcome) pairs."""
    pairs = list(outcomes)
    kinds = [kind for _, kind in pairs]
    return Tally(
        win=kinds.count("win"),
        loss=kinds.count("loss"),
        tie=kinds.count("tie") + kinds.count("changed"),
        changed=kinds.count("changed"),
        error=kinds.count("error"),
        num_questions=len({question for question, kind in pairs if kind != "error"}),
    )
