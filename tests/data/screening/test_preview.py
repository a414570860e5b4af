"""The preview of a pair: every scored token marked, nothing lost but a long middle."""

from pathlib import Path

from support.keys.data_settings import data_settings
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.data.rows.messages import message
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.screening.preview import (
    LEGEND,
    LINE_BREAK,
    LOST,
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_CHARACTERS,
    READ,
    marked_tokens,
    preview_pair,
)
from dpo_dist.data.tokens.templates import CHATML, load_tokenizer
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair


def test_every_token_stands_in_brackets(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), None)
    ids = tokenizer.encode("The sky<|im_end|>\n")
    pieces = [tokenizer.decode([token]).replace("\n", LINE_BREAK) for token in ids]
    assert marked_tokens(tokenizer, ids) == "".join(f"[{piece}]" for piece in pieces) + "\n"
    assert marked_tokens(tokenizer, ids).endswith(f"[<|im_end|>][{LINE_BREAK}]\n")


def test_tokens_that_make_one_character_share_brackets(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), None)
    ids = tokenizer.encode("\U0001f642")
    assert len(ids) > 1
    assert marked_tokens(tokenizer, ids) == "[\U0001f642]"
    assert marked_tokens(tokenizer, ids[:2]) == "[\ufffd]"  # cut by truncation


def test_the_middle_of_long_parts_is_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), None)
    ids = tokenizer.encode("x" * (MAX_PROMPT_CHARACTERS + 10))
    marked = marked_tokens(tokenizer, [ids[0]] * (MAX_ANSWER_TOKENS + 7))
    assert marked.count("[") == MAX_ANSWER_TOKENS and "... 7 tokens ..." in marked
    text = preview_pair(tokenizer, "rows.jsonl:7", ids, [1], [2]).plain
    assert "... 10 characters ..." in text


def test_a_pair_is_legible_without_color(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), None)
    prompt = tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n")
    chosen, rejected = tokenizer.encode("yes"), tokenizer.encode("no")
    text = preview_pair(tokenizer, "rows.jsonl:7", prompt, chosen, rejected).plain
    assert text == (
        f"rows.jsonl:7\nprompt, {len(prompt)} tokens\n<|im_start|>user\nHello<|im_end|>\n\n"
        f"chosen, {len(chosen)} scored tokens\n{marked_tokens(tokenizer, chosen)}\n"
        f"rejected, {len(rejected)} scored tokens\n{marked_tokens(tokenizer, rejected)}\n"
    )


def test_what_is_scored_read_and_lost_has_a_look_of_its_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), CHATML)
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "rome"}}}]
    turns = [
        message("assistant", "wait") | {"tool_calls": call}, message("tool", "20 C"),
        message("assistant", "20 degrees") | {"reasoning_content": "warm"},
    ]  # fmt: skip
    pair = Pair([message("user", "and now?")], turns, [message("assistant", "no")], "s", "o")
    settings = data_settings(allow_lost=["tool_calls"])
    pairs = PairTokenizer(tokenizer, settings)
    (found,) = pairs.encode([pair])
    assert isinstance(found, TokenPair)
    ids = found.prompt_ids, found.chosen_ids, found.rejected_ids
    shown = preview_pair(tokenizer, "rows.jsonl:7", *ids, pairs.lost(pair))
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styles["{weather} {city} {rome}\n"] == styles["{warm}\n"] == LOST
    assert styles[marked_tokens(tokenizer, tokenizer.encode("wait<|im_end|>\n"))] == "green"
    assert styles["<|im_start|>tool\n20 C<|im_end|>\n<|im_start|>assistant\n"] == READ
    assert shown.plain.endswith(
        "lost, because the chat template leaves it out\n"
        "tool_calls of message 2 (assistant): {weather} {city} {rome}\n"
        "thought of the answer: {warm}\n"
    )
    assert {str(span.style) for span in LEGEND.spans} == {"green", READ, LOST}
