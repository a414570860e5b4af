"""Chat templates: built-in ones, files, default system message, and what an error says."""

from pathlib import Path

import pytest
from support.keys.data_settings import data_settings
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.data.rows.messages import message
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.tokens.render import RenderedPair, TemplateRefusal, end_of_turn, render_pair
from dpo_dist.data.tokens.templates import (
    BUILTIN_TEMPLATES,
    load_tokenizer,
    resolve_template,
    split_markers,
)
from dpo_dist.errors import DataError

TURNS = [message("user", "Q"), message("assistant", "P"), message("user", "R")]


def conversation(*turns: dict[str, str]) -> Pair:
    answers = [message("assistant", "A")], [message("assistant", "B")]
    return Pair(list(turns), *answers, "source", "rows.jsonl:7")


def rendered(
    folder: Path, template: str | None, pair: Pair, system_message: str | None = None
) -> RenderedPair:
    tokenizer = load_tokenizer(make_tokenizer(folder / "model"), resolve_template(template))
    return render_pair(tokenizer, pair, data_settings(system_message=system_message))


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nP<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
            "<|im_start|>assistant\n",
            "A<|im_end|>\n",
        ),
        (
            "llama3",
            "<|im_start|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nP<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "A<|eot_id|>",
        ),
        (
            "mistral",
            "<|im_start|>[INST] S\n\nQ [/INST] P<|im_end|>[INST] R [/INST]",
            " A<|im_end|>",
        ),
        (
            "zephyr",
            "<|system|>\nS<|im_end|>\n<|user|>\nQ<|im_end|>\n<|assistant|>\nP<|im_end|>\n"
            "<|user|>\nR<|im_end|>\n<|assistant|>\n",
            "A<|im_end|>\n",
        ),
    ],
)
def test_builtin_templates(tmp_path: Path, name: str, prompt: str, answer: str) -> None:
    text = rendered(tmp_path, name, conversation(message("system", "S"), *TURNS))
    assert text.prompt == prompt
    assert text.chosen == prompt + answer
    assert text.rejected == prompt + answer.replace("A", "B")


def test_a_template_from_a_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    text = rendered(tmp_path, str(path), conversation(message("user", "Q")))
    assert text.chosen == "<user>Q<assistant>A"
    own = rendered(tmp_path, None, conversation(message("user", "Q")))
    assert own.chosen.startswith("<|im_start|>user\nQ")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_default_system_message_is_for_conversations_without_one(
    tmp_path: Path, role: str
) -> None:
    added = rendered(tmp_path, None, conversation(*TURNS), "Be kind.")
    assert added.prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ")
    own = rendered(tmp_path, None, conversation(message(role, "S"), *TURNS), "Be kind.")
    assert "Be kind." not in own.prompt


def test_text_is_joined_as_it_is_and_ends_in_eos_once(tmp_path: Path) -> None:
    pair = Pair("Q:", " A", " B<|im_end|>", "source", "rows.jsonl:7")
    text = rendered(tmp_path, None, pair, "Be kind.")
    assert text == RenderedPair("Q:", "Q: A<|im_end|>", "Q: B<|im_end|>")


def test_what_a_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TemplateRefusal, match="^System role not supported$"):
        rendered(tmp_path, str(path), conversation(message("system", "S")))


def test_a_tool_call_without_content_has_an_empty_one_for_a_template_that_needs_it(
    tmp_path: Path,
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "tool_calls": [call]}
    found = rendered(tmp_path, "chatml", conversation(message("user", "Q"), turn))
    assert "<|im_start|>assistant\n<|im_end|>\n" in found.prompt


@pytest.mark.fault(23, "a role that the template does not name", becomes="refused with the row")
def test_a_role_that_the_template_does_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateRefusal) as caught:
        rendered(tmp_path, "chatml", conversation(message("narrator", "Q")))
    assert str(caught.value) == "it does not know the role 'narrator'"
    path = tmp_path / "own.jinja"
    path.write_text(BUILTIN_TEMPLATES["chatml"].text + "{# 'narrator' #}")
    found = rendered(tmp_path, str(path), conversation(message("narrator", "Q")))
    assert found.prompt.startswith("<|im_start|>narrator\nQ")


def test_a_developer_is_a_system_where_the_template_has_none(tmp_path: Path) -> None:
    found = rendered(tmp_path, "chatml", conversation(message("developer", "S"), TURNS[0]))
    assert found.prompt.startswith("<|im_start|>system\nS<|im_end|>")


@pytest.mark.fault(23, "a tokenizer without a chat template", becomes="refused with the remedy")
def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, chat_template=None), None)
    with pytest.raises(DataError) as caught:
        render_pair(tokenizer, conversation(*TURNS), data_settings())
    assert str(caught.value) == (
        "rows.jsonl:7 is a conversation, and the tokenizer has no chat template; expected a chat "
        "template. Set data.chat_template to chatml, llama3, mistral, zephyr or a Jinja file."
    )
    assert render_pair(tokenizer, Pair("Q", "A", "B", "s", "o"), data_settings()).prompt == "Q"


def test_a_template_that_is_neither_a_name_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve_template("chatlm")
    assert str(caught.value) == (
        "data.chat_template 'chatlm' is no built-in name, and no file (No such file or "
        "directory); expected a Jinja file or one of chatml, llama3, mistral, zephyr. "
        "Did you mean chatml?"
    )
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="t.jinja is not UTF-8 text; .* Correct the path.$"):
        resolve_template(str(tmp_path / "t.jinja"))


def test_a_template_that_is_not_jinja(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(make_tokenizer(tmp_path), "\n{% for m in messages %}")
    assert str(caught.value).startswith(f"the chat template of {tmp_path} is not Jinja (line 2: ")
    assert str(caught.value).endswith(
        "; expected a Jinja template. Correct the file of data.chat_template, or the model's "
        "chat_template.jinja."
    )


def test_a_tokenizer_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path, None)
    assert str(caught.value).startswith(f"the tokenizer in {tmp_path} does not load (")
    assert str(caught.value).endswith(
        "; expected tokenizer.json and tokenizer_config.json of a Hugging Face tokenizer. "
        "Copy the tokenizer's files into the model folder."
    )


def test_markers_that_the_tokenizer_would_split(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), None)
    assert split_markers(tokenizer, "chatml") == []
    assert split_markers(tokenizer, "llama3") == list(BUILTIN_TEMPLATES["llama3"].markers)
    assert split_markers(tokenizer, None) == split_markers(tokenizer, "mine.jinja") == []


@pytest.mark.parametrize(
    ("template", "end"),
    [("chatml", "<|im_end|>"), ("zephyr", "<|im_end|>"), ("llama3", None), (None, None)],
)
def test_the_special_token_at_the_end_of_a_turn(
    template: str | None, end: str | None, tmp_path: Path
) -> None:
    """llama3's marks are text to this tokenizer, and without a template there is no turn."""
    folder = make_tokenizer(tmp_path / "model", chat_template=None)
    tokenizer = load_tokenizer(folder, resolve_template(template))
    found = end_of_turn(tokenizer)
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))
