"""Why a pair is dropped and what is worth a note: names, policy keys and words for the report."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Reason:
    """A ground for dropping; `policy` is the key of the data section, None: always dropped."""

    name: str
    policy: str | None
    meaning: str
    remedy: str


BAD_ROW: Final = "bad_row"
UNPAIRED: Final = "unpaired"
NO_PREFERENCE: Final = "no_preference"
NO_SHARED_PROMPT: Final = "no_shared_prompt"
LOW_MARGIN: Final = "low_margin"
TEMPLATE: Final = "template"
LOST_TEXT: Final = "lost_text"
EMPTY: Final = "empty"
LEFT_OUT: Final = "left_out"
PROMPT_FILLS: Final = "prompt_fills"
IDENTICAL: Final = "identical"
IDENTICAL_TRUNCATED: Final = "identical_truncated"
CONFLICT: Final = "conflict"
DUPLICATE: Final = "duplicate"
OVERLAP: Final = "overlap"

# In the order they are looked at: a pair counts under the first that fits.
DROP_REASONS = (
    Reason(
        BAD_ROW,
        None,  # data.on_bad_row, while rows are read
        "a field is missing or of another kind than its format has",
        "Correct or remove the row.",
    ),
    Reason(
        UNPAIRED,
        None,
        "no answer with the other label has its prompt",
        "Take a source with good and bad answers to the same prompts.",
    ),
    Reason(
        NO_PREFERENCE,
        None,
        "no answer scores above another, or there is only one",
        "Take rows with several answers that differ in score.",
    ),
    Reason(
        NO_SHARED_PROMPT,
        None,
        "the dialogues share no turns that both answer",
        "Check that chosen and rejected answer the same prompt.",
    ),
    Reason(
        LOW_MARGIN,
        None,
        "the scores are closer than the source's min_score_margin, or the other way round",
        "Lower min_score_margin of the source.",
    ),
    Reason(
        TEMPLATE,
        None,
        "the chat template refuses the conversation",
        "Set data.chat_template to one that takes these roles.",
    ),
    Reason(
        LOST_TEXT,
        "on_lost_text",
        "the chat template leaves out what the row says",
        "Set data.chat_template to one that writes it, or data.allow_lost to do without.",
    ),
    Reason(
        EMPTY,
        "on_empty",
        "the prompt or an answer is empty",
        "Check the source's columns and format.",
    ),
    Reason(
        LEFT_OUT,
        None,
        "data.leave_out has its key",
        "Remove the key from data.leave_out.",
    ),
    Reason(
        PROMPT_FILLS,
        "on_prompt_fills",
        "the prompt leaves no room for an answer",
        "Raise data.max_length.",
    ),
    Reason(
        IDENTICAL,
        "on_identical",
        "chosen and rejected are the same",
        "Check the source's columns.",
    ),
    Reason(
        IDENTICAL_TRUNCATED,
        "on_identical",
        "chosen and rejected are the same after truncation",
        "Raise data.max_length.",
    ),
    Reason(
        CONFLICT,
        "on_conflict",
        "another pair prefers the other answer",
        "Check whether sources have chosen and rejected exchanged.",
    ),
    Reason(
        DUPLICATE,
        "on_duplicate",
        "the same pair was there before",
        "Check whether a source is listed twice; `weight` repeats rows on purpose.",
    ),
    Reason(
        OVERLAP,
        "on_overlap",
        "a training pair has its prompt",
        "Split training and held-out rows by prompt.",
    ),
)
KEPT: Final = 0
CODES = {reason.name: code for code, reason in enumerate(DROP_REASONS, start=1)}

SEVERAL_TURNS: Final = "several_turns"
MERGED_BOUNDARY: Final = "merged_boundary"
REWRITTEN_PROMPT: Final = "rewritten_prompt"
SPECIAL_IN_TEXT: Final = "special_in_text"
ANSWER_IS_PROMPT: Final = "answer_is_prompt"
TRUNCATED: Final = "truncated"

# name -> meaning; a kept pair can have several, bit 1 << index.
NOTES = {
    SEVERAL_TURNS: "an answer has several turns: those of the assistant are scored",
    MERGED_BOUNDARY: "tokens would merge across prompt and answer: tokenized apart",
    REWRITTEN_PROMPT: "the template renders the prompt otherwise before an answer: cut there",
    SPECIAL_IN_TEXT: "the text itself holds a special token of the tokenizer",
    ANSWER_IS_PROMPT: "an answer repeats the prompt word for word",
    TRUNCATED: "an answer is cut at max_length",
}
NOTE_BITS = {name: 1 << index for index, name in enumerate(NOTES)}
