"""Pairs of dialogues: where the prompt ends, and what stands twice."""

import re
from dataclasses import replace
from typing import Literal

from dpo_dist.data.drop_reasons import NO_SHARED_PROMPT
from dpo_dist.data.rows.messages import (
    ROLES,
    SYSTEM_ROLES,
    Conversation,
    Message,
    continued,
    dialogue_in,
    message,
    num_repeated,
    num_shared,
    read_messages,
    read_tools,
    same,
    text_of,
)
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row

# the reason a row makes no pair
NoPair = Literal["no_shared_prompt", "unpaired", "no_preference", "low_margin"]
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def shared_prompt_pair(
    row: Row, chosen: Conversation, rejected: Conversation, source: str
) -> Pair | NoPair:
    """Splits two dialogues where they part: the prompt is what they share, the answers the rest.

    An answer begins with an assistant's message: where dialogues part in what a tool or a user
    says, with the last one before that. Without any there is no common prompt to answer.
    """
    chosen, rejected = (_with_system(row, dialogue) for dialogue in (chosen, rejected))
    # dialogues that are the same have one answer, the last turn
    turn = min(num_shared(chosen, rejected), max(len(chosen), len(rejected)) - 1)
    if turn >= min(len(chosen), len(rejected)):
        return NO_SHARED_PROMPT
    for answer in (chosen[turn], rejected[turn]):
        if answer["role"] not in ROLES:
            found = f"an answer has the role {answer['role']!r}"
            raise row.unusable(found, "assistant (gpt, model, bot and ai are read as it)")
    while turn and not chosen[turn]["role"] == rejected[turn]["role"] == "assistant":
        turn -= 1
    if turn == 0:
        return NO_SHARED_PROMPT
    return Pair(
        prompt=chosen[:turn],
        chosen=chosen[turn:],
        rejected=rejected[turn:],
        source=source,
        origin=row.origin,
        tools=read_tools(row),
    )


def hh_dialogue(row: Row, name: str) -> Conversation:
    """Messages of a text `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    text = row.text(name)
    before, *turns = _HH_TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        begins = text if len(text) <= 40 else text[:37] + "..."
        raise row.unusable(
            f"field {name!r} begins with {begins!r}", "a dialogue that begins with 'Human:'"
        )
    return [
        message("user" if role == "Human" else "assistant", content.strip())
        for role, content in zip(turns[0::2], turns[1::2], strict=True)
    ]


def dialogue_pair(row: Row, source: str) -> Pair | NoPair:
    """The pair of two dialogues, whether the prompt stands in them, beside them, or both."""
    chosen, rejected = (read_messages(row, name) for name in ("chosen", "rejected"))
    if row.fields.get("prompt") is None:
        return shared_prompt_pair(row, chosen, rejected, source)
    if isinstance(row.fields["prompt"], str) and not dialogue_of(row, "prompt"):
        # beside full dialogues this column only repeats a part of them, as in UltraFeedback
        repeated = any(turn["role"] == "user" for turn in chosen + rejected)
        opening = [] if repeated else [message("user", row.text("prompt"))]
        return shared_prompt_pair(row, opening + chosen, opening + rejected, source)
    opening = read_messages(row, "prompt")
    if any(len(d) == len(opening) == num_repeated(opening, d) for d in (chosen, rejected)):
        return shared_prompt_pair(row, chosen, rejected, source)  # an answer is no prompt
    begun = opening.pop() if opening[-1]["role"] == "assistant" else None
    dialogues = [_beyond(opening, begun, dialogue) for dialogue in (chosen, rejected)]
    pair = shared_prompt_pair(row, opening + dialogues[0], opening + dialogues[1], source)
    if begun is None or isinstance(pair, str):
        return pair
    if len(pair.prompt) == len(opening):
        return replace(pair, prompt=[*pair.prompt, begun], continues_turn=True)
    whole = [[*opening, continued(begun, first), *rest] for first, *rest in dialogues]
    return shared_prompt_pair(row, whole[0], whole[1], source)


def _beyond(opening: Conversation, begun: Message | None, dialogue: Conversation) -> Conversation:
    """What a dialogue adds to a prompt, which it may repeat whole or from its last turns on.

    `begun` is the beginning of the answer's turn: a turn of its own in the dialogue, the
    beginning of the next one, or left out.
    """
    rest = dialogue[num_repeated(opening, dialogue) :]
    if begun is None or not rest:
        return rest
    if len(rest) > 1 and same(rest[0], begun):
        return rest[1:]
    text, start = text_of(rest[0]), text_of(begun)
    if len(rest) < len(dialogue) and text.startswith(start):
        return [{**rest[0], "content": text[len(start) :]}, *rest[1:]]
    return rest


def dialogue_of(row: Row, name: str) -> Conversation | None:
    """The messages of a field that holds some, be it as JSON text; None: text, or nothing."""
    value = row.fields.get(name)
    if value is None or (isinstance(value, str) and dialogue_in(row, name, value) is None):
        return None
    return read_messages(row, name)


def system_of(row: Row) -> Conversation:
    """The message of the `system` column, when it has one."""
    return [message("system", row.text("system"))] if row.fields.get("system") else []


def _with_system(row: Row, dialogue: Conversation) -> Conversation:
    """A dialogue with the row's system message, which it may hold already."""
    system = system_of(row)
    if not system or dialogue[:1] == system:
        return dialogue
    if dialogue and dialogue[0]["role"] in SYSTEM_ROLES:
        raise row.unusable(
            "field 'system' and the dialogue's own system message differ", "one system message"
        )
    return system + dialogue
