"""Why our ids of a row are not TRL's: every reason, each with a condition of its own.

A reason takes a case and gives it back without what it explains, or None where it does not hold.
Most rewrite the row as TRL would need it to come to our ids; the others look at the ids. None of
them calls our code.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from support.oracles.trl_preparation import Case, Fields, ids_of, trl_ids

from dpo_dist.data.drop_reasons import MERGED_BOUNDARY, NOTE_BITS

Reason = Callable[[Case], Case | None]
Turn = dict[str, Any]
DIALOGUES = ("prompt", "chosen", "rejected")
DROPPED = "dropped"
_NAMES = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}


def reasons_of(case: Case) -> list[str]:
    """The reasons for which a case differs, none when it does not; fails when one is not listed."""
    found: list[str] = []
    for name, without in REASONS.items():
        if case.agrees:
            break
        rest = without(case)
        if rest is not None:
            found.append(name)
            case = rest
    assert case.agrees, (found, case.fields, case.ours, case.theirs)
    return found


def _rewritten(rewrite: Callable[[Case], Fields | None]) -> Reason:
    """The reason that TRL gets other ids from a row that is written otherwise."""

    def without(case: Case) -> Case | None:
        fields = rewrite(case)
        if fields is None or fields == case.fields:
            return None
        (theirs,) = trl_ids(case.tokenizer, [fields])
        if theirs == case.theirs or (isinstance(theirs, str) and not isinstance(case.ours, str)):
            return None
        return replace(case, fields=fields, theirs=theirs)

    return without


def _each_turn(case: Case, change: Callable[[Turn], Turn]) -> Fields:
    """The row with every message changed."""
    dialogues = {name: case.fields.get(name) for name in DIALOGUES}
    changed = {n: [change(t) for t in d] for n, d in dialogues.items() if isinstance(d, list)}
    return {**case.fields, **changed}


def _text_prompt(case: Case) -> Fields | None:
    if not isinstance(case.fields.get("prompt"), str) or isinstance(case.fields["chosen"], str):
        return None
    return {name: value for name, value in case.fields.items() if name != "prompt"}


def _other_names(case: Case) -> Fields | None:
    fields = dict(case.fields)
    if "conversations" in fields:
        fields["prompt"] = fields.pop("conversations")
    lists = {n: v if isinstance(v, list) else [v] for n, v in fields.items() if n in DIALOGUES}
    if isinstance(fields["chosen"], str):
        return None

    def change(turn: Turn) -> Turn:
        turn = {_NAMES.get(name, name): value for name, value in turn.items()}
        return {**turn, "role": _ROLES.get(turn["role"], turn["role"])}

    return _each_turn(replace(case, fields=fields | lists), change)


def _json_text(case: Case) -> Fields | None:
    fields = dict(case.fields)
    if "chat_template_kwargs" in fields:
        fields["chat_template_kwargs"] = _parsed(fields["chat_template_kwargs"])

    def change(turn: Turn) -> Turn:
        if not turn.get("tool_calls"):
            return turn
        calls = [
            {**call, "function": function | {"arguments": _parsed(function["arguments"])}}
            for call in turn["tool_calls"]
            for function in [call["function"]]
        ]
        return {**turn, "tool_calls": calls}

    return _each_turn(replace(case, fields=fields), change)


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _parts(case: Case) -> Fields | None:
    def change(turn: Turn) -> Turn:
        content = turn.get("content")
        if not isinstance(content, list):
            return turn
        return {**turn, "content": "".join(part["text"] for part in content)}

    return _each_turn(case, change)


def _nulls(case: Case) -> Fields | None:
    return _each_turn(case, _without_nulls)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}


def _system_column(case: Case) -> Fields | None:
    if not case.fields.get("system"):
        return None
    fields = {name: value for name, value in case.fields.items() if name != "system"}
    system = [{"role": "system", "content": case.fields["system"]}]
    for name in ("prompt",) if "prompt" in fields else ("chosen", "rejected"):
        fields[name] = system + fields[name]
    return fields


def _repeated(case: Case) -> Fields | None:
    prompt = case.fields.get("prompt")
    if not isinstance(prompt, list):
        return None
    fields = dict(case.fields)
    for name in ("chosen", "rejected"):
        counts = range(len(prompt), 0, -1)
        n = next((n for n in counts if prompt[-n:] == fields[name][:n]), 0)
        fields[name] = fields[name][n:]
    return fields


def _spaces(case: Case) -> Fields | None:
    chosen, rejected = case.fields["chosen"], case.fields["rejected"]
    if not isinstance(chosen, list) or "prompt" in case.fields:
        return None

    def same(one: Turn, other: Turn) -> bool:
        strip = [{**turn, "content": (turn.get("content") or "").strip()} for turn in (one, other)]
        return strip[0] == strip[1]

    begins = [c if same(c, r) else r for c, r in zip(chosen, rejected, strict=False)]
    return {**case.fields, "rejected": [*begins, *rejected[len(begins) :]]}


def _begun_turn(case: Case) -> Case | None:
    prompt = case.fields.get("prompt")
    if not isinstance(prompt, list) or prompt[-1]["role"] != "assistant":
        return None
    *before, begun = prompt
    answers = {
        name: [{**first, "content": begun["content"] + first["content"]}, *rest]
        for name in ("chosen", "rejected")
        for first, *rest in [case.fields[name]]
    }
    found = _rewritten(lambda case: {**case.fields, "prompt": before, **answers})(case)
    return found and _cut_as_ours(found)


def _cut_as_ours(case: Case) -> Case:
    """The case with TRL's ids cut where ours are, if it is the cut alone that differs."""
    if isinstance(case.ours, str) or isinstance(case.theirs, str):
        return case
    prompt, *ours = ids_of(case.ours)
    whole = [case.theirs[0] + answer for answer in case.theirs[1:]]
    if [prompt + _unmarked(answer) for answer in ours] != whole:
        return case
    chosen, rejected = (ids[len(prompt) :] for ids in whole)
    return replace(case, theirs=(prompt, chosen, rejected))


def _unmarked(ids: Sequence[int]) -> list[int]:
    return [token if token >= 0 else ~token for token in ids]


def _dialogues(case: Case) -> tuple[list[Turn], list[Turn]] | None:
    chosen, rejected = case.fields["chosen"], case.fields["rejected"]
    if isinstance(chosen, str):
        return None
    prompt = case.fields.get("prompt") or []
    return prompt + chosen, prompt + rejected


def _num_shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    return [*same, False].index(False)


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> int | None:
    """How many turns come before the last one that both begin an answer with, or their answers."""
    shared = _num_shared(chosen, rejected)
    if chosen == rejected:
        shared -= 1
    if shared >= min(len(chosen), len(rejected)):
        return None
    both = [
        at
        for at in range(1, shared + 1)
        if chosen[at]["role"] == rejected[at]["role"] == "assistant"
    ]
    return both[-1] if both else None


def _split(case: Case) -> Fields | None:
    dialogues = _dialogues(case)
    turn = dialogues and _shared_turns(*dialogues)
    if not dialogues or turn is None:
        return None
    chosen, rejected = dialogues
    parts = {"prompt": chosen[:turn], "chosen": chosen[turn:], "rejected": rejected[turn:]}
    return {**case.fields, **parts}


def _no_split(case: Case) -> Case | None:
    dialogues = _dialogues(case)
    if case.ours != "no_shared_prompt" or not dialogues or _shared_turns(*dialogues) is not None:
        return None
    return replace(case, theirs=DROPPED)


def _whole_words(case: Case) -> Fields | None:
    chosen, rejected = case.fields["chosen"], case.fields["rejected"]
    if "prompt" in case.fields or not isinstance(chosen, str):
        return None
    end = len(os.path.commonprefix([chosen, rejected]))
    while end and re.match(r"\w", chosen[end - 1]):
        end -= 1
    while end and chosen[end - 1].isspace():
        end -= 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _unknown_role(case: Case) -> Case | None:
    dialogues = _dialogues(case)
    roles = {turn["role"] for dialogue in dialogues or () for turn in dialogue}
    known = {"system", "user", "assistant", "tool", "developer"}
    named = set(re.findall(r"[\"'](\w+)[\"']", str(case.tokenizer.chat_template)))
    if not isinstance(case.ours, str) or not roles - known - named:
        return None
    return replace(case, theirs=DROPPED)


def _developer(case: Case) -> Fields | None:
    if "developer" in str(case.tokenizer.chat_template):
        return None
    return _each_turn(case, lambda t: {**t, "role": t["role"].replace("developer", "system")})


def _spelled(case: Case) -> Fields | None:
    """The calls as a template takes them that TRL's row makes raise."""
    if not isinstance(case.theirs, str):
        return None

    def with_text(turn: Turn) -> Turn:
        return {**turn, "content": turn.get("content") or ""}

    def with_json(turn: Turn) -> Turn:
        turn = with_text(turn)
        if not turn.get("tool_calls"):
            return turn
        calls = [
            {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}
            for call in turn["tool_calls"]
            for function in [call["function"]]
        ]
        return {**turn, "tool_calls": calls}

    for change in (with_text, with_json):
        fields = _each_turn(replace(case, fields=_without_nulls(dict(case.fields))), change)
        (theirs,) = trl_ids(case.tokenizer, [fields])
        if not isinstance(theirs, str):
            return fields
    return None


def _rewritten_turn(case: Case) -> Case | None:
    """A turn of an answer that the template writes otherwise when others follow it."""
    dialogues = _dialogues(case)
    if not isinstance(case.ours, str) or "otherwise than alone" not in case.ours or not dialogues:
        return None
    kwargs = {"tools": _parsed(case.fields.get("tools")), "tokenize": False}
    num_shared = _num_shared(*dialogues)
    for dialogue in dialogues:
        text = case.tokenizer.apply_chat_template(dialogue, **kwargs)
        for end in range(num_shared + 1, len(dialogue)):
            if not text.startswith(case.tokenizer.apply_chat_template(dialogue[:end], **kwargs)):
                return replace(case, theirs=DROPPED)
    return None


def _rewritten_prompt(case: Case) -> Case | None:
    """The last words of the prompt stand behind what its text has in common with the whole."""
    dialogues = _dialogues(case)
    if case.ours != "it renders the prompt otherwise before an answer" or not dialogues:
        return None
    prompt = case.fields.get("prompt") or dialogues[0][: _shared_turns(*dialogues)]
    end: dict[str, Any] = {"add_generation_prompt": True}
    if prompt[-1]["role"] == "assistant":
        end = {"continue_final_message": True}
        first = dialogues[0][len(prompt)]
        begun = {**prompt[-1], "content": prompt[-1]["content"] + first["content"]}
        dialogues[0][len(prompt) - 1 : len(prompt) + 1] = [begun]
    kwargs = {"tools": _parsed(case.fields.get("tools")), "tokenize": False}
    alone = case.tokenizer.apply_chat_template(prompt, **kwargs, **end)
    whole = case.tokenizer.apply_chat_template(dialogues[0], **kwargs)
    said = prompt[-1]["content"]
    if said not in whole or said in os.path.commonprefix([alone, whole]):
        return None
    return replace(case, theirs=DROPPED)


def _no_eos(case: Case) -> Case | None:
    if case.tokenizer.eos_token or isinstance(case.fields["chosen"], list):
        return None
    if isinstance(case.ours, str) or not isinstance(case.theirs, str):
        return None
    whole = [case.fields["prompt"] + case.fields[name] for name in ("chosen", "rejected")]
    theirs = [case.tokenizer(text)["input_ids"] for text in whole]
    start = len(os.path.commonprefix([case.tokenizer(case.fields["prompt"])["input_ids"], *theirs]))
    return replace(case, theirs=(theirs[0][:start], theirs[0][start:], theirs[1][start:]))


def _twice(case: Case) -> Case | None:
    """An EOS that the tokenizer appends to the one in the text, or a BOS before the one in it."""
    if isinstance(case.theirs, str) or isinstance(case.fields["chosen"], list):
        return None
    prompt, chosen, rejected = case.theirs
    bos, eos = case.tokenizer.bos_token_id, case.tokenizer.eos_token_id
    if eos is not None and all(answer[-2:] == [eos, eos] for answer in (chosen, rejected)):
        return replace(case, theirs=(prompt, chosen[:-1], rejected[:-1]))
    if bos is not None and prompt[:2] == [bos, bos]:
        return replace(case, theirs=(prompt[1:], chosen, rejected))
    return None


def _context(case: Case) -> Case | None:
    """Ids that are the same once what is only read is written as what is scored."""
    if isinstance(case.ours, str) or not any(t < 0 for ids in ids_of(case.ours) for t in ids):
        return None
    roles = {turn["role"] for d in _dialogues(case) or () for turn in d}
    assert any(len(case.fields[n]) > 1 for n in ("chosen", "rejected")) and len(roles) > 1
    chosen, rejected = map(_unmarked, (case.ours.chosen_ids, case.ours.rejected_ids))
    return replace(case, ours=replace(case.ours, chosen_ids=chosen, rejected_ids=rejected))


def _merged(case: Case) -> Case | None:
    """The same text, cut at the end of the prompt, where TRL's tokens go across."""
    if isinstance(case.ours, str) or isinstance(case.theirs, str):
        return None
    ours, theirs = ids_of(case.ours), case.theirs
    texts = [[case.tokenizer.decode(p + a) for a in answers] for p, *answers in (ours, theirs)]
    begins = ours[0][: len(theirs[0])] == theirs[0]
    noted = case.ours.notes & NOTE_BITS[MERGED_BOUNDARY]
    if not noted or ours == theirs or texts[0] != texts[1] or not begins:
        return None
    return replace(case, theirs=ours)


def _lost(case: Case) -> Case | None:
    """A text of the row that TRL's ids do not have either; we drop such a row."""
    if isinstance(case.theirs, str):
        return None
    prompt, *answers = case.theirs
    missing = [
        part
        for dialogue, answer in zip(_dialogues(case) or (), answers, strict=False)
        for text in [case.tokenizer.decode(prompt + answer)]
        for part in [*_texts(dialogue), *_names(case.fields.get("tools"))]
        if part.strip() not in text
    ]
    if not missing:
        return None
    if isinstance(case.ours, str):
        is_begun = "the final message does not appear in the chat" in case.ours
        return replace(case, theirs=DROPPED) if is_begun else None
    return replace(case, ours=replace(case.ours, lost=None)) if case.ours.lost else None


def _texts(value: Any) -> Iterator[str]:
    """The texts of messages, roles and types of calls aside."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "type", "name"):
                yield from _texts(item)
        yield str(value.get("name") or "")
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _names(tools: Any) -> list[str]:
    return [tool["function"]["name"] for tool in _parsed(tools) or []]


# In the order they are looked at: the row as TRL needs it first, then the ids. The first column of
# the table in docs/data.md.
REASONS: dict[str, Reason] = {
    "a text `prompt` beside whole dialogues": _rewritten(_text_prompt),
    "other names: `from` and `value`, `human`, `gpt`, `conversations`": _rewritten(_other_names),
    "JSON text for the arguments of a call or the template's variables": _rewritten(_json_text),
    "content as a list of text parts": _rewritten(_parts),
    "keys that are null, as in typed tables": _rewritten(_nulls),
    "a `system` column": _rewritten(_system_column),
    "answers that repeat the prompt or its last turns": _rewritten(_repeated),
    "dialogues whose shared turns differ in space": _rewritten(_spaces),
    "a template that rewrites the prompt's turns before an answer": _rewritten_prompt,
    "a prompt that ends in an assistant turn": _begun_turn,
    "dialogues that part in another's turn; answers that begin alike": _rewritten(_split),
    "dialogues without a turn that both answer": _no_split,
    "plain texts without a `prompt`": _rewritten(_whole_words),
    "a role that the template does not name": _unknown_role,
    "`developer`, where the template has no such role": _rewritten(_developer),
    "a tool call in a spelling that the template does not take": _rewritten(_spelled),
    "a turn of an answer that changes when others follow": _rewritten_turn,
    "plain text and a tokenizer without EOS": _no_eos,
    "plain text and a tokenizer that adds EOS, or BOS to a text that has it": _twice,
    "an answer of several turns": _context,
    "tokens that merge across prompt and answer": _merged,
    "text that the template leaves out": _lost,
}
