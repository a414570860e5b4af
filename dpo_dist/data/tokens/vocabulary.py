"""Tokens that the run adds to a tokenizer, and whether the model has an embedding for each."""

# pyright: basic
# (transformers' types are partial)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.data.pairs import Pairs, unmarked
from dpo_dist.data.tokens.templates import load_tokenizer
from dpo_dist.errors import DataError
from dpo_dist.model_files.files import vocab_size_of

NUM_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """The size of a tokenizer with what was added to it, and the ids that are new."""

    num_tokens: int
    new_ids: tuple[int, ...]


def extended_tokenizer(
    model_dir: Path, tokens: Sequence[str], trust_remote_code: bool = False
) -> tuple[Any, Vocabulary]:
    """(the model's tokenizer with `tokens` as special tokens, its size and the new ids).

    Tokens that it has already stay where they are.
    """
    from transformers import AddedToken

    tokenizer: Any = load_tokenizer(model_dir, None, trust_remote_code)
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in new)
    return tokenizer, Vocabulary(len(tokenizer), ids)


def check_vocabulary(pairs: Pairs, model_dir: Path, trust_remote_code: bool = False) -> None:
    """Raises DataError when a pair holds a token beyond the model's embeddings.

    A tokenizer may be longer than the embeddings as long as nothing uses the rest: gemma-3-1b's has
    one token for images.
    """
    vocab_size = vocab_size_of(model_dir)
    if vocab_size is None or not len(pairs):
        return
    largest = max(
        int(unmarked(chunk.values.to_numpy()).max(initial=0))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        for chunk in pairs.table[name].chunks
    )
    if largest < vocab_size:
        return
    tokenizer: Any = load_tokenizer(model_dir, None, trust_remote_code)
    beyond = tokenizer.convert_ids_to_tokens(list(range(vocab_size, len(tokenizer))))
    shown = ", ".join(beyond[:NUM_SHOWN]) + (", ..." if len(beyond) > NUM_SHOWN else "")
    raise DataError(
        f"the tokenizer has {len(tokenizer):,} tokens and the model embeddings for {vocab_size:,}; "
        f"the pairs use token {largest}",
        "an embedding for every token of the pairs",
        f"Name the tokens in model.add_tokens ({shown}), which lengthens the embeddings, or use "
        "the tokenizer that belongs to the model.",
    )
