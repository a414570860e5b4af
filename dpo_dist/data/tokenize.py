"""Pairs to token ids.

For every pair three texts are tokenised: the prompt as a model gets it when it generates, and the
prompt followed by each answer. An answer's ids are what follows the prompt's ids.

| the prompt's ids are | then |
| --- | --- |
| the beginning of both longer texts, as nearly always | the rest are the answers |
| not, though its text is: tokens would merge across the boundary | the answer is tokenised apart |
| not, and its text is neither: the template rewrites it | all are cut at their common prefix |

The second rule keeps the prompt exactly as it is at generation time; TRL shortens the prompt
there. In the third case, as in TRL, what the generation prompt adds is left out.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_dist.data.formats import Pair
from dpo_dist.data.reasons import (
    ANSWER_IS_PROMPT,
    CUT_TO_SHARED,
    MERGED_BOUNDARY,
    NOTE_BITS,
    REWRITTEN_PROMPT,
    SPECIAL_IN_TEXT,
)
from dpo_dist.data.templates import RenderedPair, TemplateRefusal, render_pair

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, not truncated, and the notes on it (bits of NOTE_BITS)."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    notes: int


class PairTokenizer:
    """Tokenises pairs with one tokenizer and default system message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_message: str | None) -> None:
        self.tokenizer = tokenizer
        self.system_message = system_message
        self._bos_ids = _leading_special_ids(tokenizer)
        first = tokenizer.tokenize("x")[0]
        self._prepends_space = first.startswith("\u2581")  # the SentencePiece sign of a space
        special = sorted({*map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode(self, pairs: Sequence[Pair]) -> list[TokenPair | TemplateRefusal]:
        """One result a pair, in order; a refusal where the chat template does not take it."""
        rendered: list[RenderedPair | TemplateRefusal] = []
        for pair in pairs:
            try:
                rendered.append(render_pair(self.tokenizer, pair, self.system_message))
            except TemplateRefusal as refusal:
                rendered.append(refusal)
        taken = [item for item in rendered if isinstance(item, RenderedPair)]
        ids = iter(self._ids([text for r in taken for text in (r.prompt, r.chosen, r.rejected)]))
        return [
            item
            if isinstance(item, TemplateRefusal)
            else self._split(pair, item, next(ids), next(ids), next(ids))
            for pair, item in zip(pairs, rendered, strict=True)
        ]

    def _split(
        self, pair: Pair, text: RenderedPair, prompt: Ids, chosen: Ids, rejected: Ids
    ) -> TokenPair:
        """The ids of the three parts from those of the three texts."""
        notes = self._notes_on_text(pair)
        if isinstance(pair.prompt, str) and not self._writes_bos(text.prompt):
            # a template writes its own BOS; plain text gets what the tokenizer would add
            prompt, chosen, rejected = (self._bos_ids + ids for ids in (prompt, chosen, rejected))
        whole = text.chosen.startswith(text.prompt) and text.rejected.startswith(text.prompt)
        if not whole:
            cut = min(_num_shared(prompt, chosen), _num_shared(prompt, rejected))
            notes |= NOTE_BITS[REWRITTEN_PROMPT]
            return TokenPair(prompt[:cut], chosen[cut:], rejected[cut:], notes)
        answers: list[Ids] = []
        for answer, ids in ((text.chosen, chosen), (text.rejected, rejected)):
            if ids[: len(prompt)] == prompt:
                answers.append(ids[len(prompt) :])
            else:
                notes |= NOTE_BITS[MERGED_BOUNDARY]
                answers.append(self._continuation_ids(answer[len(text.prompt) :]))
        return TokenPair(prompt, answers[0], answers[1], notes)

    def _ids(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def _continuation_ids(self, text: str) -> Ids:
        """Ids of a text that continues another, also where the tokenizer prepends a space."""
        anchor_ids, anchored_ids, ids = self._ids(["\n", "\n" + text, text])
        if self._prepends_space and anchored_ids[: len(anchor_ids)] == anchor_ids:
            return anchored_ids[len(anchor_ids) :]
        return ids

    def _writes_bos(self, prompt: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and prompt.startswith(str(bos))

    def _notes_on_text(self, pair: Pair) -> int:
        notes = NOTE_BITS[CUT_TO_SHARED] if pair.cut_to_shared else 0
        if pair.answer_repeats_prompt:
            notes |= NOTE_BITS[ANSWER_IS_PROMPT]
        if any(map(self._special.search, pair.texts())):
            notes |= NOTE_BITS[SPECIAL_IN_TEXT]
        return notes


def _num_shared(ids: Ids, others: Ids) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(ids, others, strict=False)):
        if a != b:
            return index
    return min(len(ids), len(others))


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids a tokenizer puts before a text by itself: BOS, or nothing."""
    bare = tokenizer.encode("x", add_special_tokens=False)
    full = tokenizer.encode("x", add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
