"""The preview of a pair: every scored token marked, nothing lost but a long middle."""

from pathlib import Path

from support.tiny_tokenizer import make_tokenizer

from dpo_dist.data.screening.preview import (
    LINE_BREAK,
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_CHARACTERS,
    marked_tokens,
    preview_pair,
)
from dpo_dist.data.tokens.templates import load_tokenizer


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
