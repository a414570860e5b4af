"""A tiny random Llama with a tokenizer of words, and a model cut to its first layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

NUM_WORDS = 200


def write_tiny_model(folder: str) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "</s>"]
    words = special + [f"w{number}" for number in range(NUM_WORDS)]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=1,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return {}


def cut_layers(model: str, layers: int, folder: str) -> dict[str, Any]:
    """The model with its first layers only: its words make no sense, its work is that of each."""
    from transformers import AutoModelForCausalLM

    cut = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers)
    shutil.rmtree(folder, ignore_errors=True)
    cut.save_pretrained(folder)
    for path in Path(model).iterdir():
        if path.suffix in (".json", ".jinja") and not (Path(folder) / path.name).exists():
            shutil.copy(path, folder)
    return {}
