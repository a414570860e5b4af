"""Sections of a run config about the pairs: sources, the gate, tokenizing."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dpo_dist.config.section import Fraction, PathText, PositiveInt, Rule, Section

PairKey = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Policy = Literal["drop", "raise", "keep"]
PreferenceFormat = Literal[
    "auto", "conversational", "standard", "ultrafeedback", "orca", "hh", "stack_exchange",
    "alpaca", "ranked", "scored", "labelled",
]  # fmt: skip
PairChoice = Literal["best_vs_worst", "best_vs_rest", "adjacent", "all"]
# one answer a row: those to the same prompt are found by reading all rows
JOINED_FORMATS: tuple[PreferenceFormat, ...] = ("labelled", "scored")
LosablePart = Literal["content", "thought", "earlier_thought", "tool_calls", "tools"]


class SourceSection(Section):
    path: PathText = Field(
        description="JSONL, JSON, Parquet or CSV file, a pattern of files, datasets folder, or "
        "hub id."
    )
    name: str | None = Field(None, description="Name in reports; defaults to the file's stem.")
    format: PreferenceFormat = Field(
        "auto", description="Row format; auto infers it from the columns."
    )
    columns: dict[str, str] = Field(
        {},
        description="The file's column for each of ours, e.g. {prompt: question, chosen: good}.",
    )
    config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set or datasets folder.")
    revision: str | None = Field(None, description="Hub branch, tag or commit of the data set.")
    streaming: bool = Field(
        False, description="Read a hub data set once, row by row, without storing it."
    )
    limit: PositiveInt | None = Field(None, description="Read at most this many rows.")
    weight: float = Field(
        1.0, gt=0, description="Share of rows to take: 0.5 every second one, 2 each one twice."
    )
    min_score_margin: float | None = Field(
        None, description="Drop pairs whose chosen_score - rejected_score is below this."
    )
    pairs: PairChoice = Field(
        "best_vs_worst", description="Which of several ranked or scored answers make pairs."
    )

    def identity(self) -> dict[str, Any]:
        """The settings that pairs depend on; `pairs` came later and is left out at its default."""
        later = {"pairs"} if self.pairs == type(self).model_fields["pairs"].default else None
        return self.model_dump(mode="json", exclude=later)


class DataSection(Section):
    train: list[SourceSection] = Field(min_length=1, description="Sources of training pairs.")
    eval: list[SourceSection] = Field([], description="Sources of held-out pairs.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of training prompts to hold out with all their pairs."
    )
    eval_seed: int = Field(0, description="Seed that picks the held-out prompts.")
    max_length: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Maximum tokens of prompt + answer; auto: p99, rounded up to a multiple of 8.",
    )
    chat_template: PathText | None = Field(
        None, description="Built-in name or Jinja file; defaults to the tokenizer's own."
    )
    system_message: str | None = Field(
        None, description="System message for conversations without one."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables of the template, e.g. {enable_thinking: false}; a row's win."
    )
    on_bad_row: Literal["raise", "drop"] = Field(
        "raise", description="Rows that cannot be read: tell of the first ten, or drop them."
    )
    max_bad_rows: Fraction = Field(
        0.01, description="With on_bad_row drop: fail if more than this share cannot be read."
    )
    on_lost_text: Policy = Field(
        "raise",
        description="Pairs with text that the template leaves out; raise lets a few be dropped.",
    )
    allow_lost: list[LosablePart] = Field(
        [], description="Parts that a template may leave out, e.g. [earlier_thought]."
    )
    on_empty: Policy = Field("drop", description="Pairs with an empty prompt or answer.")
    on_identical: Policy = Field(
        "drop", description="Pairs with equal answers, before or after truncation."
    )
    on_prompt_fills: Literal["drop", "raise"] = Field(
        "drop", description="Pairs whose prompt leaves no room for an answer."
    )
    on_duplicate: Policy = Field("drop", description="Pairs that repeat an earlier one.")
    on_conflict: Policy = Field(
        "drop", description="Pairs that contradict each other: A > B and B > A."
    )
    on_overlap: Policy = Field("drop", description="Held-out pairs whose prompt is trained on.")
    leave_out: list[PairKey] = Field(
        [], description="Keys of pairs to leave out, as errors and non_finite/ name them."
    )
    max_dropped: Fraction = Field(0.5, description="Fail if more than this share is dropped.")
    order: Literal["pairs", "prompts"] = Field(
        "pairs",
        description="What an epoch shuffles: pairs, or prompts with all their pairs, in which less "
        "is computed twice.",
    )
    num_workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Tokenizing processes; auto uses one per core, at most 16."
    )

    @property
    def holds_out(self) -> bool:
        """Whether there will be held-out pairs."""
        return bool(self.eval) or self.eval_fraction > 0


def data_rules(data: DataSection) -> Iterator[Rule]:
    """What must hold between keys of a source."""
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield (
                source.streaming and source.format in JOINED_FORMATS,
                f"data.{split}.{index}.streaming: true with format {source.format}",
                "false, because the two answers of a pair may be anywhere in the data",
                "Set it to false, or pair the rows beforehand.",
            )
