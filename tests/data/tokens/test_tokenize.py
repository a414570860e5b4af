"""Token ids of pairs: the boundary between prompt and answer, BOS, EOS, notes."""

from pathlib import Path

import pytest
from support.keys.data_settings import data_settings
from support.tiny_tokenizer import make_tokenizer, sentencepiece_like
from transformers import PreTrainedTokenizerBase

from dpo_dist.data.drop_reasons import (
    ANSWER_IS_PROMPT,
    MERGED_BOUNDARY,
    NOTE_BITS,
    REWRITTEN_PROMPT,
    SEVERAL_TURNS,
    SPECIAL_IN_TEXT,
)
from dpo_dist.data.rows.messages import message
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.templates import CHATML, ZEPHYR, load_tokenizer
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair

QUESTION = "What is the color of the sky?"


def tiny(folder: Path, template: str | None = CHATML) -> PreTrainedTokenizerBase:
    return load_tokenizer(make_tokenizer(folder, template), None)


def chat(chosen: str = "The sky is blue.", rejected: str = "No.", question: str = QUESTION) -> Pair:
    answers = [message("assistant", chosen)], [message("assistant", rejected)]
    return Pair([message("user", question)], *answers, "source", "rows.jsonl:7")


def text(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(prompt, chosen, rejected, "source", "rows.jsonl:7")


def encoded(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> TokenPair:
    (found,) = PairTokenizer(tokenizer, data_settings()).encode([pair])
    assert isinstance(found, TokenPair)
    return found


def plain_ids(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    return tokenizer.encode(words, add_special_tokens=False)


def test_the_prompt_is_what_is_seen_at_generation_and_the_answers_follow(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    pair = encoded(tokenizer, chat())
    assert pair.prompt_ids == tokenizer.apply_chat_template(
        [message("user", QUESTION)], add_generation_prompt=True, return_dict=False
    )
    for ids, answer in ((pair.chosen_ids, "The sky is blue."), (pair.rejected_ids, "No.")):
        whole = tokenizer.apply_chat_template(
            [message("user", QUESTION), message("assistant", answer)], return_dict=False
        )
        assert pair.prompt_ids + ids == whole
        assert tokenizer.decode(ids) == f"{answer}<|im_end|>\n"  # EOS as the template has it
    assert pair.notes == 0


def test_one_result_a_pair_in_order_with_refusals(tmp_path: Path) -> None:
    strict = (
        CHATML + "{%- if '!' in messages[0]['content'] -%}{{ raise_exception('no') }}{%- endif -%}"
    )
    tokenizer = tiny(tmp_path, strict)
    questions = ["a", "b!", "c", "a"]
    found = PairTokenizer(tokenizer, data_settings()).encode([chat(question=q) for q in questions])
    assert [isinstance(item, TemplateRefusal) for item in found] == [False, True, False, False]
    assert found[0] == found[3] == encoded(tokenizer, chat(question="a")) != found[2]
    assert PairTokenizer(tokenizer, data_settings()).encode([]) == []


def test_the_default_system_message_is_tokenized(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    (found,) = PairTokenizer(tokenizer, data_settings(system_message="Be kind.")).encode([chat()])
    assert isinstance(found, TokenPair)
    assert tokenizer.decode(found.prompt_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_text_ends_in_eos_and_has_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    pair = encoded(tokenizer, text("The answer", " is yes.", " is no.<|im_end|>"))
    assert tokenizer.decode(pair.prompt_ids) == "The answer"
    assert tokenizer.decode(pair.chosen_ids) == " is yes.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == " is no.<|im_end|>"


@pytest.mark.fault(23, "a tokenizer without a pad token", becomes="the same ids")
def test_no_pad_token_is_needed(tmp_path: Path) -> None:
    """Nor does generation need one (`test_a_batch_says_what_its_prompts_say_alone`)."""
    tokenizer = tiny(tmp_path)
    assert tokenizer.pad_token is not None
    before = encoded(tokenizer, chat())
    tokenizer.pad_token = None
    assert encoded(tokenizer, chat()) == before


@pytest.mark.fault(23, "BOS in the text and by the tokenizer", becomes="one BOS")
def test_text_gets_the_bos_of_its_tokenizer_once() -> None:
    tokenizer = sentencepiece_like("always")
    pair = encoded(tokenizer, text("The sky", " is blue.", " is no."))
    assert pair.prompt_ids == tokenizer.encode("The sky")
    assert pair.prompt_ids[0] == tokenizer.bos_token_id
    written = encoded(tokenizer, text("<s>The sky", " is blue.", " is no."))
    assert written.prompt_ids.count(int(tokenizer.bos_token_id)) == 1


@pytest.mark.fault(23, "BOS by the template and by the tokenizer", becomes="one BOS")
def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = sentencepiece_like("always")
    tokenizer.chat_template = "{{ bos_token }}" + ZEPHYR
    pair = encoded(tokenizer, chat())
    assert pair.prompt_ids[0] == tokenizer.bos_token_id
    assert pair.prompt_ids.count(int(tokenizer.bos_token_id)) == 1


def test_tokens_that_would_merge_across_the_boundary_stay_apart(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    assert plain_ids(tokenizer, "The answer") != [
        *plain_ids(tokenizer, "The ans"), *plain_ids(tokenizer, "wer")
    ]  # fmt: skip
    pair = encoded(tokenizer, text("The ans", "wer", " is no."))
    assert pair.prompt_ids == plain_ids(tokenizer, "The ans")
    assert pair.chosen_ids == plain_ids(tokenizer, "wer<|im_end|>")
    assert pair.rejected_ids == plain_ids(tokenizer, " is no.<|im_end|>")
    assert pair.notes == NOTE_BITS[MERGED_BOUNDARY]


def test_a_template_whose_end_merges_with_the_answer(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path, CHATML.replace("assistant\\n' }}", "assistant: the ans' }}").replace(
        "message['role'] + '\\n'", "message['role'] + (': the ans' if message['role'] == "
        "'assistant' else '\\n')"))  # fmt: skip
    pair = encoded(tokenizer, chat("wer is", " no"))
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant: the ans")
    assert pair.prompt_ids[-3:] == plain_ids(tokenizer, "assistant: the ans")[-3:]
    assert pair.chosen_ids == plain_ids(tokenizer, "wer is<|im_end|>\n")
    assert pair.notes == NOTE_BITS[MERGED_BOUNDARY]


def test_a_template_that_rewrites_the_prompt_is_cut_at_the_common_prefix(tmp_path: Path) -> None:
    thinking = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    tokenizer = tiny(tmp_path, thinking)
    pair = encoded(tokenizer, chat("The sky is blue.", "No."))
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen_ids) == "The sky is blue.<|im_end|>\n"
    assert pair.notes == NOTE_BITS[REWRITTEN_PROMPT]


def test_a_template_that_shares_no_token_with_the_prompt_is_a_refusal(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (found,) = PairTokenizer(tiny(tmp_path, template), data_settings()).encode([chat()])
    assert isinstance(found, TemplateRefusal)
    assert str(found) == "it renders the prompt otherwise before an answer"


def test_an_answer_is_the_same_behind_the_end_of_the_prompt_as_behind_all_of_it(
    tmp_path: Path,
) -> None:
    tokenizer = PairTokenizer(tiny(tmp_path), data_settings())
    pair = chat("<|im_end|> \n\nThe sky", " No.", question="Hello\n<|im_start|> ")
    behind_the_end = tokenizer.encode([pair])
    tokenizer._anchor = ""  # no special token is known: everything is tokenized as one text
    assert tokenizer.encode([pair]) == behind_the_end


@pytest.mark.parametrize("prepend_scheme", ["always", "first"])
def test_a_tokenizer_that_prepends_a_space_puts_none_before_an_answer(prepend_scheme: str) -> None:
    tokenizer = sentencepiece_like(prepend_scheme)
    tokenizer.chat_template = ZEPHYR
    pair = encoded(tokenizer, chat("answer", "no."))
    whole = tokenizer.apply_chat_template(
        [message("user", QUESTION), message("assistant", "answer")], return_dict=False
    )
    assert pair.prompt_ids + pair.chosen_ids == whole
    assert not tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0].startswith("\u2581")
    # also where tokens merge across the boundary, and the answer is tokenized by itself
    merged = encoded(tokenizer, text("The sk", "y is blue.", " is no."))
    assert merged.notes == NOTE_BITS[MERGED_BOUNDARY]
    assert not tokenizer.convert_ids_to_tokens(merged.chosen_ids)[0].startswith("\u2581")


@pytest.mark.fault(23, "special tokens inside the text", becomes="noted in the report")
def test_notes_on_the_text(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    inside = encoded(tokenizer, chat("The <|im_end|> token", "No."))
    assert inside.notes == NOTE_BITS[SPECIAL_IN_TEXT]
    echo = encoded(tokenizer, chat(QUESTION, "No."))
    assert echo.notes == NOTE_BITS[ANSWER_IS_PROMPT]
    one, other = [message("assistant", "A")], [message("assistant", "B")]
    longer = Pair([message("user", "Q")], one, [*other, message("user", "R"), *one], "s", "o")
    assert encoded(tokenizer, longer).notes == NOTE_BITS[SEVERAL_TURNS]
