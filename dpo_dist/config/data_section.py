"""Sections of a run config about the pairs: sources, the gate, tokenizing."""

from typing import Literal

from pydantic import Field

from dpo_dist.config.section import Fraction, PositiveInt, Section

Policy = Literal["drop", "raise", "keep"]
PreferenceFormat = Literal[
    "auto", "conversational", "standard", "ultrafeedback", "orca", "hh", "stack_exchange",
    "alpaca", "labelled",
]  # fmt: skip


class SourceSection(Section):
    path: str = Field(description="JSONL, JSON, Parquet or CSV file, datasets folder, or hub id.")
    name: str | None = Field(None, description="Name in reports; the file's stem by default.")
    format: PreferenceFormat = Field("auto", description="Row format; auto looks at the columns.")
    columns: dict[str, str] = Field(
        {}, description="Our column name -> the file's, e.g. {prompt: question, chosen: good}."
    )
    config: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set or datasets folder.")
    revision: str | None = Field(None, description="Hub revision of the data set.")
    streaming: bool = Field(
        False, description="Read a hub data set once, row by row, and store nothing of it."
    )
    limit: PositiveInt | None = Field(None, description="Take at most this many rows.")
    weight: float = Field(
        1.0, gt=0, description="Share of the source's rows taken: 0.5 every second, 2 all twice."
    )
    min_score_margin: float | None = Field(
        None, description="Drop pairs with chosen_score - rejected_score below this."
    )


class DataSection(Section):
    train: list[SourceSection] = Field(min_length=1, description="Sources of training pairs.")
    eval: list[SourceSection] = Field([], description="Sources of held-out pairs.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the training prompts held out, all their pairs."
    )
    eval_seed: int = Field(0, description="Seed of the choice of held-out prompts.")
    max_length: PositiveInt | Literal["auto"] = Field(
        "auto", description="Tokens of prompt + completion; auto: p99 rounded up to 8."
    )
    chat_template: str | None = Field(
        None, description="Built-in name or Jinja file; the tokenizer's own by default."
    )
    system_message: str | None = Field(
        None, description="System message for conversations that have none."
    )
    on_empty: Policy = Field("drop", description="Pair with an empty prompt or answer.")
    on_identical: Policy = Field("drop", description="Same chosen and rejected, also truncated.")
    on_prompt_fills: Literal["drop", "raise"] = Field(
        "drop", description="Prompt leaves no room for an answer."
    )
    on_duplicate: Policy = Field("drop", description="Pair that was there before.")
    on_conflict: Policy = Field("drop", description="A > B and B > A for one prompt.")
    on_overlap: Policy = Field("drop", description="Held-out pair whose prompt is trained on.")
    max_dropped: Fraction = Field(0.5, description="Refuse when more than this share is dropped.")
    num_workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Tokenizing processes; auto: one a core, at most 16."
    )

    @property
    def holds_out(self) -> bool:
        """Whether there will be held-out pairs."""
        return bool(self.eval) or self.eval_fraction > 0
