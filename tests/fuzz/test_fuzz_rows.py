"""Rows of any content, and data files that are damaged: read, or refused by file and line."""

import bz2
import functools
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import changed_json, damaged, json_texts, outcome, texts, values
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_tokenizer import make_tokenizer
from transformers import AutoTokenizer

from dpo_dist.config.data_section import DataSection, SourceSection
from dpo_dist.data.answers.answer_files import keep_whole_lines, read_answers
from dpo_dist.data.answers.questions import read_questions
from dpo_dist.data.drop_reasons import DROP_REASONS
from dpo_dist.data.rows.formats import READ_COLUMNS, read_pair, rename_columns, score_margin
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.sources.ranked_rows import pair_rows
from dpo_dist.data.sources.sources import Source, open_sources
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair

FORMATS = (
    "auto", "conversational", "standard", "ultrafeedback", "orca", "hh", "stack_exchange",
    "alpaca", "ranked", "scored", "labelled",
)  # fmt: skip
COLUMNS = sorted(READ_COLUMNS | {"image", "query", "extra"})
KEYS = (
    "role", "content", "from", "value", "name", "tool_calls", "function", "arguments", "text",
    "type", "function_call", "thinking", "data", "id",
)  # fmt: skip
ROLES = ("system", "user", "assistant", "tool", "human", "gpt", "function_call", "critic")


PLAIN = st.sampled_from(("Sky?", "Blue.", "\n\nHuman: a\n\nAssistant: b"))


@functools.cache
def messages() -> st.SearchStrategy[Any]:
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": PLAIN | PLAIN | texts() | values()},
        optional={
            "tool_calls": values(*KEYS), "name": values(), "thinking": values(),
            "tool_call_id": values(), "from": values(), "function_call": values(),
        },
    )  # fmt: skip
    return st.lists(message, min_size=1, max_size=4)


# names of columns by format, those that a row must have first
SHAPES = (
    (("prompt", "chosen", "rejected"), ("system", "tools", "chat_template_kwargs", "images")),
    (("chosen", "rejected"), ("conversations", "messages", "prompt", "query")),
    (("question", "chosen", "rejected"), ("system", "chosen_score", "rejected_score")),
    (("question", "response_j", "response_k"), ("system", "score_chosen", "score_rejected")),
    (("instruction", "chosen", "rejected"), ("input", "history", "system")),
    (("completion", "label"), ("prompt", "question", "system", "tools")),
    (("messages", "label"), ("tools", "chosen_score")),
    (("prompt", "responses"), ("scores", "ranks", "system", "tools")),
    (("prompt", "response", "score"), ("system", "tools")),
)


@functools.cache
def fields() -> st.SearchStrategy[Any]:
    known = messages() | messages().map(lambda m: json.dumps(m)) | PLAIN
    return known | known | known | texts() | values(*KEYS)


@functools.cache
def rows() -> st.SearchStrategy[Any]:
    shaped = [
        st.fixed_dictionaries(
            {name: PLAIN | fields() if name != "label" else st.booleans() for name in needed},
            optional={name: fields() for name in others},
        )
        for needed, others in SHAPES
    ]
    return st.one_of(*shaped) | st.dictionaries(st.sampled_from(COLUMNS), fields(), max_size=6)


ASKED = {"role": "user", "content": "How many legs has a spider?"}
VALID: list[list[dict[str, Any]]] = [
    [{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}] * 2,
    [
        {
            "prompt": [ASKED],
            "chosen": [{"role": "assistant", "content": "Eight."}],
            "rejected": [{"role": "assistant", "content": "Six."}],
            "tools": [{"type": "function", "function": {"name": "count"}}],
            "chosen_score": 5, "rejected_score": 2.5,
        }
    ]
    * 2,
    [
        {"messages": [ASKED, {"role": "assistant", "content": text}], "label": text == "Eight."}
        for text in ("Eight.", "Six.")
    ],
    [
        {
            "instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4",
            "history": [["a", "b"]],
        }
    ],
    [{"prompt": "Sky?", "responses": ["Blue", "Red", "Red"], "scores": [3, 1, 1.5]}] * 2,
    [{"prompt": "Sky?", "answers": [{"answer": "Blue", "rank": 2}, {"answer": "x", "rank": 1}]}],
    [{"prompt": "Sky?", "response": text, "score": len(text)} for text in ("Blue", "Red")],
]  # fmt: skip


def spelled(rows: list[dict[str, Any]]) -> list[bytes]:
    """The rows as lines, as an array, and as one below "data"."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    whole = [json.dumps(rows, indent=1), json.dumps({"v": 1, "data": rows, "end": []})]
    return [text.encode() for text in (lines, *whole)]


def table(suffix: str) -> bytes:
    columns = pa.table({"prompt": ["Sky?", "x"], "chosen": ["Blue", "y"], "rejected": ["Red", ""]})
    stream = io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(columns, stream)
    else:
        with pa.ipc.new_stream(stream, columns.schema) as writer:
            writer.write_table(columns)
    return stream.getvalue()


CSV = b'prompt,chosen,rejected\n"Sky?","Red,dish",Red\nx,"y\nz",w\n'
TABLES = {
    ".csv": CSV, ".tsv": CSV.replace(b",", b"\t"), ".parquet": table(".parquet"),
    ".arrow": table(".arrow"), ".jsonl.gz": gzip.compress(spelled(VALID[0])[0], mtime=0),
    ".jsonl.bz2": bz2.compress(spelled(VALID[0])[0]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PairTokenizer:
    path = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    train = [SourceSection.model_validate({"path": "x"})]
    settings = DataSection.model_validate({"train": train})
    return PairTokenizer(AutoTokenizer.from_pretrained(path), settings)


def pairs_in(path: Path, content: bytes, row_format: str, scratch: Path) -> list[Pair]:
    """The pairs of a data file; a row makes some, is dropped for a known reason, or is refused."""
    path.write_bytes(content)
    section = SourceSection.model_validate({"path": str(path), "format": row_format})
    opened = outcome("data file", lambda: open_sources([section], "train", scratch), str(path))
    found: list[Pair] = []
    for source in opened or []:
        positions = source.positions()
        for position, row in zip(positions, source.rows.read(positions), strict=True):
            origin = source.rows.origin(int(position))
            made = outcome("row", lambda row=row, source=source: pairs_of(row, source), origin)
            for pair in made or []:
                if isinstance(pair, Pair):
                    found.append(pair)
                else:
                    assert pair in {reason.name for reason in DROP_REASONS}
    return found


def pairs_of(row: Any, source: Source) -> list[Any]:
    row = row if row.lacks_partner else rename_columns(row.sound(), source.columns)
    rows = pair_rows(row, "all") if source.row_format == "ranked" else [row]
    for row in rows:
        score_margin(row, required=False)
    return [read_pair(row, source.row_format, source.name) for row in rows]


def tokens_of(tokenizer: PairTokenizer, pairs: list[Pair]) -> None:
    """Each is tokenized, or refused by its template or by its origin."""
    for pair in pairs:
        encoded = outcome("pair", lambda pair=pair: tokenizer.encode([pair]), pair.origin)
        assert encoded is None or isinstance(encoded[0], TokenPair | TemplateRefusal)


@given(st.lists(json_texts(rows()), min_size=1, max_size=3), st.sampled_from(FORMATS))
def test_any_row(folder: Path, tokenizer: PairTokenizer, lines: list[str], row_format: str) -> None:
    content = "\n".join(lines).encode(errors="surrogatepass")
    tokens_of(tokenizer, pairs_in(folder / "rows.jsonl", content, row_format, folder))


@given(st.data(), st.sampled_from(VALID))
def test_a_changed_row(
    folder: Path, tokenizer: PairTokenizer, data: st.DataObject, valid: list[dict[str, Any]]
) -> None:
    content = b"\n".join(data.draw(changed_json(row)).replace(b"\n", b"") for row in valid)
    tokens_of(tokenizer, pairs_in(folder / "rows.jsonl", content, "auto", folder))


@given(st.data(), st.sampled_from([text for rows in VALID for text in spelled(rows)]))
def test_a_damaged_json_file(folder: Path, data: st.DataObject, content: bytes) -> None:
    row_format = data.draw(st.sampled_from(FORMATS))
    pairs_in(folder / "rows.json", data.draw(damaged(content)), row_format, folder)


@given(st.data(), st.sampled_from(sorted(TABLES)))
def test_a_damaged_table(folder: Path, data: st.DataObject, suffix: str) -> None:
    content = data.draw(damaged(TABLES[suffix]))
    pairs_in(folder / f"rows{suffix}", content, data.draw(st.sampled_from(FORMATS)), folder)


@given(texts() | st.text(st.sampled_from("*?[]~/.ab"), max_size=8))
def test_any_path_of_a_source(folder: Path, path: str) -> None:
    try:
        section = SourceSection.model_validate({"path": path + ".jsonl"})
    except ValueError:  # as half a character, which the config refuses
        return
    outcome("path", lambda: open_sources([section], "train", folder), "data.train.0")


ANSWERS = [
    {"question_id": 1, "prompt": "Sky?", "answers": ["Blue."]},
    {"question_id": "b", "choices": [{"index": 0, "turns": ["Blue."]}]},
]


@given(st.data())
def test_changed_answers_and_questions(folder: Path, data: st.DataObject) -> None:
    path = folder / "answers.jsonl"
    lines = (data.draw(changed_json(row)).replace(b"\n", b"") for row in ANSWERS)
    path.write_bytes(b"\n".join(lines) + b"\n")
    outcome("answers", lambda: read_answers(path, None), str(path))
    outcome("questions", lambda: read_questions(path), path.name)
    outcome("answers", lambda: keep_whole_lines(path), str(path))
