"""Chat templates: which one, and a pair rendered with it.

1. `resolve_template` turns `data.chat_template` into Jinja text: a built-in name or a file.
2. `load_tokenizer` loads a model's tokenizer and gives it that template.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

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
