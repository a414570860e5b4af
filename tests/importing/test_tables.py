"""The tables of keys, of which docs/migrating.md is made too."""

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.commands.import_config import TRAINERS
from dpo_dist.config.keys import explain_keys
from dpo_dist.importing import transformers_keys
from dpo_dist.importing.settings import Peer

PAGE = Path("docs/migrating.md")
PEERS = [peer for peer, _ in TRAINERS.values()]
START, END = "<!-- keys of {} -->", "<!-- end of the keys -->"


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_key_has_one_entry(peer: Peer) -> None:
    assert [key for key, count in Counter(peer.known).items() if count > 1] == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_targets_are_keys_of_the_run_config(peer: Peer) -> None:
    ours = {key for key, *_ in explain_keys()}
    tables = (peer.same, peer.same_of_adapter, peer.converted)
    targets = [name for table in tables for text, _ in table.values() for name in text.split(", ")]
    assert [target for target in targets if target not in ours] == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_names_of_earlier_versions_lead_to_keys(peer: Peer) -> None:
    assert [key for key in peer.renamed.values() if key not in peer.known] == []
    assert [key for key in peer.shared.values() if key not in peer.defaults] == []


def test_every_training_argument_of_transformers_has_one_entry_and_its_default() -> None:
    from transformers import TrainingArguments

    fields = {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(TrainingArguments)
    }
    table = transformers_keys
    converted = {key: value for key, value in table.CONVERTED.items() if key != "warmup_ratio"}
    known = [*table.SAME, *converted, *table.DIFFERS, *table.NOT_NEEDED]
    assert sorted(known) == sorted(set(fields))
    ours = {key: default for key, (_, default) in (table.SAME | converted).items()}
    ours |= {key: default for key, (default, _) in table.DIFFERS.items()}
    theirs = {key: getattr(value, "value", value) for key, value in fields.items()}
    assert {k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k]} == {}


def rows(*lines: tuple[Any, ...]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def shown(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def code(key: str) -> str:
    """As code, unless it would look like the name of a test (tests/test_docs.py)."""
    return key if key.startswith("test_") else f"`{key}`"


def grouped(notes: dict[str, str]) -> list[tuple[str, str]]:
    """Keys with the same note in one row."""
    groups: dict[str, list[str]] = {}
    for key, note in notes.items():
        groups.setdefault(note, []).append(code(key))
    return [(", ".join(names), note) for note, names in groups.items()]


def keys_of(peer: Peer) -> str:
    """The part of the page between two comments."""
    taken = peer.same | peer.same_of_adapter | peer.converted
    note = {new: f" (`{old}` once)" for old, new in peer.renamed.items()}
    lines = [
        START.format(peer.name), "",
        *rows(("taken", "here", "left out, it is"), ("---", "---", "---")),
        *rows(*(
            (f"{code(key)}{note.get(key, '')}", ", ".join(f"`{o}`" for o in ours.split(", ")),
             shown(default))
            for key, (ours, default) in taken.items()
        )),
        "", *rows(("not taken", "what to do instead"), ("---", "---")),
        *rows(*grouped({key: remedy for key, (_, remedy) in peer.differs.items()} | peer.former)),
        "", *rows(("not needed", "because"), ("---", "---")),
        *rows(*grouped(peer.not_needed)),
        "", END,
    ]  # fmt: skip
    return "\n".join(lines)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_page_lists_every_key_as_it_is(peer: Peer) -> None:
    page, part = PAGE.read_text(), keys_of(peer)
    if os.environ.get("UPDATE_DOCS"):
        start = page.index(START.format(peer.name))
        page = page[:start] + part + page[page.index(END, start) + len(END) :]
        PAGE.write_text(page)
    assert part in page, "run `make docs`"
