"""Pairs to token ids.

Tokenized are the prompt, as a model gets it when it generates, and the prompt followed by each
answer. An answer's ids are what follows the prompt's ids.

| the prompt's ids are | then |
| --- | --- |
| the beginning of both longer texts, as nearly always | the rest are the answers |
| not, though its text is: tokens would merge across the boundary | the answer is tokenized apart |
| not, and its text is neither: the template rewrites it | all are cut at their common prefix |

The second rule keeps the prompt exactly as it is at generation time; TRL shortens the prompt
there. In the third case, as in TRL, what the generation prompt adds is left out; a pair whose
prompt changes in more than that, so that a part of it would be scored, is refused.

A tokenizer treats the text on the two sides of a special token apart. So an answer is tokenized
behind the end of the prompt only, from its last `<|im_start|>` or the like, not behind all of it.
The turns of an answer are found in its ids by the ids of the text up to their edges.
"""

# pyright: basic
# (transformers' types are partial)

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import (
    ANSWER_IS_PROMPT,
    MERGED_BOUNDARY,
    NOTE_BITS,
    REWRITTEN_PROMPT,
    SEVERAL_TURNS,
    SPECIAL_IN_TEXT,
)
from dpo_dist.data.rows.messages import Conversation
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.tokens.lost_text import Lost, is_prompt_scored, lost_parts, lost_text
from dpo_dist.data.tokens.render import (
    RenderedPair,
    TemplateRefusal,
    generation_prompt,
    render_pair,
    render_prompt,
)
from dpo_dist.data.tokens.trajectory import Span, pieces

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, not truncated, and the notes on it (bits of NOTE_BITS).

    A token of an answer that is not scored is written ~id.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    notes: int
    lost: str | None = None  # the first text of the row that is in none of them


class PairTokenizer:
    """Tokenizes pairs with one tokenizer and the settings of its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSection) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self._bos_ids = _leading_special_ids(tokenizer)
        # the SentencePiece sign of a space
        self._prepends_space = "".join(tokenizer.tokenize("x")).startswith("\u2581")
        self._special = _special_tokens_pattern(tokenizer)
        *_, self._anchor = "", *self._special.findall(generation_prompt(tokenizer))

    def encode(self, pairs: Sequence[Pair]) -> list[TokenPair | TemplateRefusal]:
        """One result a pair, in order; a refusal where the chat template does not take it."""
        rendered: list[RenderedPair | TemplateRefusal] = []
        for pair in pairs:
            try:
                rendered.append(render_pair(self.tokenizer, pair, self.settings))
            except TemplateRefusal as refusal:
                rendered.append(refusal)
        taken = [item for item in rendered if isinstance(item, RenderedPair)]
        texts = list(dict.fromkeys(text for item in taken for text in self._texts(item)))
        ids = dict(zip(texts, self._ids(texts), strict=True))
        return [
            item if isinstance(item, TemplateRefusal) else self._encoded(pair, item, ids)
            for pair, item in zip(pairs, rendered, strict=True)
        ]

    def lost(self, pair: Pair) -> list[Lost]:
        """What the chat template leaves out of a pair that it takes, each text once."""
        rendered = render_pair(self.tokenizer, pair, self.settings)
        return list(dict.fromkeys(lost_parts(pair, rendered, self.settings)))

    def prompt_ids(self, prompt: str | Conversation) -> Ids:
        """Ids of a prompt that waits for an answer, those that `encode` gives it in a pair.

        Raises TemplateRefusal when the chat template does not take it.
        """
        if not isinstance(prompt, str):
            return self._ids([render_prompt(self.tokenizer, prompt, self.settings)])[0]
        (ids,) = self._ids([prompt])
        return ids if self._writes_bos(prompt) else self._bos_ids + ids

    def _start(self, text: RenderedPair) -> int:
        """Where the end of the prompt begins, behind which answers are tokenized."""
        if not text.begin_with_prompt:
            return 0
        return max(text.prompt.rfind(self._anchor), 0) if self._anchor else 0

    def _texts(self, text: RenderedPair) -> list[str]:
        """The texts whose ids `_split` needs: prompt, its end, its end with each answer, and up to
        the edges of what is not scored."""
        start = self._start(text)
        answers = [
            answer[start:edge]
            for answer, context in text.answers
            for edge in (None, *(edge for span in context for edge in span))
        ]
        return [text.prompt, text.prompt[start:], *answers]

    def _encoded(
        self, pair: Pair, text: RenderedPair, ids: Mapping[str, Ids]
    ) -> TokenPair | TemplateRefusal:
        tokens = self._split(pair, text, ids)
        if isinstance(tokens, TemplateRefusal):
            return tokens
        return replace(tokens, lost=lost_text(pair, text, self.settings))

    def _split(
        self, pair: Pair, text: RenderedPair, ids: Mapping[str, Ids]
    ) -> TokenPair | TemplateRefusal:
        notes, start = self._notes_on_text(pair), self._start(text)
        prompt, end = ids[text.prompt], ids[text.prompt[start:]]
        if text.begin_with_prompt:
            skipped = len(end)
        else:
            whole = (ids[answer] for answer, _ in text.answers)
            skipped = min(_num_shared(prompt, answer) for answer in whole)
            notes |= NOTE_BITS[REWRITTEN_PROMPT]
            if skipped == 0 or is_prompt_scored(pair, text, self.settings):
                return TemplateRefusal("it renders the prompt otherwise before an answer")
            prompt = end = prompt[:skipped]
        answers: list[Ids] = []
        for answer, context in text.answers:
            edges = [[ids[answer[start:edge]] for edge in span] for span in context]
            marked = _marked(ids[answer[start:]], end, edges)
            if marked is None and not text.begin_with_prompt:
                return TemplateRefusal("it renders the prompt otherwise before an answer")
            if marked is None:
                notes |= NOTE_BITS[MERGED_BOUNDARY]
                answers.append(self._ids_by_piece(answer, len(text.prompt), context))
            else:
                answers.append(marked[skipped:])
        if isinstance(pair.prompt, str) and not self._writes_bos(text.prompt):
            # a template writes its own BOS; plain text gets what the tokenizer would add
            prompt = self._bos_ids + prompt
        return TokenPair(prompt, answers[0], answers[1], notes)

    def _ids_by_piece(self, answer: str, start: int, context: list[Span]) -> Ids:
        """Ids of an answer whose turns are tokenized apart."""
        found: Ids = []
        for piece, scored in pieces(answer, start, context):
            ids = self._continuation_ids(piece)
            found += ids if scored else [~token for token in ids]
        return found

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
        notes = NOTE_BITS[SEVERAL_TURNS] if pair.has_several_turns else 0
        if pair.answer_repeats_prompt:
            notes |= NOTE_BITS[ANSWER_IS_PROMPT]
        if any(map(self._special.search, pair.texts())):
            notes |= NOTE_BITS[SPECIAL_IN_TEXT]
        return notes


def _marked(ids: Ids, prompt_end: Ids, edges: Sequence[Sequence[Ids]]) -> Ids | None:
    """Ids with ~id between the edges, which are ids up to there; None: tokens merge across one."""
    marked = ids.copy()
    if ids[: len(prompt_end)] != prompt_end:
        return None
    for first, last in edges:
        if ids[: len(first)] != first or ids[: len(last)] != last:
            return None
        for place in range(len(first), len(last)):
            marked[place] = ~ids[place]
    return marked


def _num_shared(ids: Ids, others: Ids) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(ids, others, strict=False)):
        if a != b:
            return index
    return min(len(ids), len(others))


def _special_tokens_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches every special token, also those without a role such as BOS."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids a tokenizer puts before a text by itself: BOS, or nothing."""
    bare = tokenizer.encode("x", add_special_tokens=False)
    full = tokenizer.encode("x", add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
