"""Chat templates: which one, and a pair rendered with it.

1. `resolve_template` turns `data.chat_template` into Jinja text: a built-in name or a file.
2. `load_tokenizer` loads a model's tokenizer and gives it that template.
3. `render_pair` renders prompt, prompt + chosen and prompt + rejected.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from dpo_dist.data.rows.formats import Pair
from dpo_dist.data.rows.messages import SYSTEM_ROLES, Conversation, message
from dpo_dist.errors import DataError
from dpo_dist.wording import first_line

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
LLAMA3 = """\
{{- bos_token or '' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
# Mistral has no system role: the system message opens the first user turn.
MISTRAL = """\
{{- bos_token or '' }}
{%- set opening = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set opening.text = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + opening.text + message['content'] + ' [/INST]' }}
{%- set opening.text = '' -%}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
ZEPHYR = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""


@dataclass(frozen=True)
class BuiltinTemplate:
    """A template of ours; `markers` are what must be single tokens for a model to stop there."""

    text: str
    markers: tuple[str, ...]


BUILTIN_TEMPLATES = {
    "chatml": BuiltinTemplate(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": BuiltinTemplate(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": BuiltinTemplate(MISTRAL, ()),
    "zephyr": BuiltinTemplate(ZEPHYR, ()),
}


class TemplateRefusal(Exception):
    """A chat template does not take a conversation; the message is the template's own."""


@dataclass(frozen=True)
class RenderedPair:
    """The texts that are tokenized: the prompt, and the prompt with each answer."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def begin_with_prompt(self) -> bool:
        """Whether both longer texts begin with the prompt's; not every template does that."""
        return self.chosen.startswith(self.prompt) and self.rejected.startswith(self.prompt)


def resolve_template(name: str | None) -> str | None:
    """Jinja text of a built-in name or a file; None: the tokenizer's own. Raises DataError."""
    if name is None:
        return None
    if name in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name].text
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        found = f"data.chat_template {name} is not UTF-8 text"
    except OSError as error:
        found = f"data.chat_template {name!r} is no built-in name, and no file ({error.strerror})"
    close = difflib.get_close_matches(name, BUILTIN_TEMPLATES, n=1)
    raise DataError(
        found,
        f"a Jinja file or one of {', '.join(BUILTIN_TEMPLATES)}",
        f"Did you mean {close[0]}?" if close else "Correct the path.",
    )


def load_tokenizer(
    model_dir: Path, template: str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with `template` in place of its own unless None.

    Raises DataError when the tokenizer does not load or the template is not Jinja.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise DataError(
            f"the tokenizer in {model_dir} does not load ({reason})",
            "tokenizer.json and tokenizer_config.json of a Hugging Face tokenizer",
            "Copy the tokenizer's files into the model folder.",
        ) from None
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template:
        _check_syntax(tokenizer, model_dir)
    return tokenizer


def split_markers(tokenizer: PreTrainedTokenizerBase, name: str | None) -> list[str]:
    """Markers of a built-in template that are no single token of this tokenizer."""
    builtin = BUILTIN_TEMPLATES.get(name or "")
    if builtin is None:
        return []
    ids = [tokenizer.encode(marker, add_special_tokens=False) for marker in builtin.markers]
    return [marker for marker, pieces in zip(builtin.markers, ids, strict=True) if len(pieces) != 1]


def render_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, system_message: str | None
) -> RenderedPair:
    """Renders a pair; texts are joined as they are, conversations go through the template.

    The generation prompt is part of the prompt. A text answer ends in EOS, as in TRL; where a
    conversation ends in EOS is the template's decision. Raises TemplateRefusal, and DataError
    for a conversation when the tokenizer has no template.
    """
    if isinstance(pair.prompt, str):
        eos = str(tokenizer.eos_token or "")
        chosen, rejected = str(pair.chosen), str(pair.rejected)
        return RenderedPair(
            pair.prompt,
            pair.prompt + chosen.removesuffix(eos) + eos,
            pair.prompt + rejected.removesuffix(eos) + eos,
        )
    assert isinstance(pair.chosen, dict) and isinstance(pair.rejected, dict), pair
    if not tokenizer.chat_template:
        raise DataError(
            f"{pair.origin} is a conversation, and the tokenizer has no chat template",
            "a chat template",
            f"Set data.chat_template to {', '.join(BUILTIN_TEMPLATES)} or a Jinja file.",
        )
    prompt = _with_system_message(pair.prompt, system_message)
    return RenderedPair(
        _render(tokenizer, prompt, pair.tools, generation_prompt=True),
        _render(tokenizer, [*prompt, pair.chosen], pair.tools),
        _render(tokenizer, [*prompt, pair.rejected], pair.tools),
    )


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, system_message: str | None
) -> str:
    """A conversation that waits for its next answer, as `render_pair` renders a prompt.

    Raises TemplateRefusal.
    """
    prompt = _with_system_message(conversation, system_message)
    return _render(tokenizer, prompt, None, generation_prompt=True)


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template writes before an answer, with the user turn before it; "" without one."""
    if not tokenizer.chat_template:
        return ""
    try:
        return _render(tokenizer, [message("user", "?")], None, generation_prompt=True)
    except TemplateRefusal:
        return ""


def _with_system_message(prompt: Conversation, system_message: str | None) -> Conversation:
    if not system_message or (prompt and prompt[0]["role"] in SYSTEM_ROLES):
        return prompt
    return [message("system", system_message), *prompt]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    tools: list[Any] | None,
    generation_prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            conversation, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        # TypeError: a template that adds a null content to a string
        raise TemplateRefusal(str(error) or repr(error)) from None
    return str(text)


def _check_syntax(tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template of {model_dir} is not Jinja (line {error.lineno}: {error.message})",
            "a Jinja template",
            "Correct the file of data.chat_template, or the model's chat_template.jinja.",
        ) from None
    except (jinja2.TemplateError, TypeError, ValueError):
        pass  # this one conversation does not suit it; the rows may
