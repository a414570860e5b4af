"""Sections of a run config about the model, the reference and the training."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from dpo_dist.config.section import (
    FilePath,
    Fraction,
    Interval,
    PathText,
    PositiveInt,
    Rule,
    Section,
)


class ModelSection(Section):
    path: PathText = Field(description="Folder or hub id of the base model.")
    revision: str | None = Field(None, description="Hub branch, tag or commit of the model.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Dtype of the forward; the optimizer keeps float32 master weights."
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="nf4 freezes the base in 4 bits (QLoRA); needs adapter and bitsandbytes."
    )
    attention: Literal["auto", "sdpa", "torch", "flash_attn"] = Field(
        "auto", description="Attention backend; auto picks the fastest that the model supports."
    )
    layout: Literal["auto", "packed", "padded"] = Field(
        "auto",
        description="auto packs pairs around a shared prompt if the self-check at load passes.",
    )
    add_tokens: list[str] = Field(
        [], description="Special tokens to add; their embeddings start as the mean of the rest."
    )
    pad_vocab_to_multiple: PositiveInt | None = Field(
        None, description="Pad the vocabulary to a multiple of this size."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model.")
    allow_pickle_weights: bool = Field(
        False, description="Load .bin weights; unpickling them can run code."
    )


class ReferenceSection(Section):
    model: PathText | None = Field(
        None, description="Folder or hub id of the reference; defaults to the starting policy."
    )
    store_dir: FilePath | None = Field(
        None,
        description="Folder of the reference store, which runs may share; by default in run.dir.",
    )
    sharding: Literal["auto", "whole", "zero3"] = Field(
        "auto",
        description="Whole model on every rank, or ZeRO-3 partitions, in reference, evaluate and "
        "verify; auto decides by size.",
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Packed tokens per scoring forward; defaults to twice those of train."
    )
    part: str | None = Field(
        None,
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="Score only this part of the pairs, e.g. 2/8, as a job of its own.",
    )


class AdapterSection(Section):
    path: PathText | None = Field(
        None, description="Folder or hub id of a LoRA adapter to start from, e.g. after SFT."
    )
    start: Literal["continue", "merge"] = Field(
        "continue",
        description="Keep training the adapter at path, or merge it and train a fresh one.",
    )
    rank: PositiveInt = Field(16, description="LoRA rank r.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha; the scale is alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on adapter inputs.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Names of modules to adapt; all-linear, which is every linear layer but the "
        "head; or a regular expression for whole names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rsLoRA).")
    use_dora: bool = Field(False, description="Train weight-decomposed adapters (DoRA).")
    modules_to_save: list[str] = Field([], description="Modules to train in full alongside LoRA.")
    exclude_modules: list[str] = Field([], description="Modules to leave without an adapter.")
    target_parameters: list[str] = Field(
        [], description="Parameters to adapt that are not layers, e.g. mlp.experts.down_proj."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        {}, description="Ranks by end of module name, e.g. {down_proj: 32}."
    )
    alpha_pattern: dict[str, float] = Field(
        {}, description="Alphas by end of module name, e.g. {down_proj: 64}."
    )

    @field_validator("target_modules")
    @classmethod
    def _check_pattern(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error})") from None
        return value


class TrainSection(Section):
    num_epochs: float = Field(1.0, gt=0, description="Passes over the training pairs.")
    max_steps: PositiveInt | None = Field(
        None, description="Stop after this many steps if the epochs last longer."
    )
    global_batch_size: PositiveInt = Field(
        64, description="Pairs per optimizer step, over all ranks."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192, description="Packed tokens per forward of a rank; changes memory, not numbers."
    )
    optimizer: Literal[
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon"
    ] = Field(
        "adamw", description="Optimizer; docs/memory.md lists what each keeps and where it works."
    )
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Schedule after warmup; linear ends at 0, cosine at min_lr_rate. wsd is stable "
        "at the peak, then decays to min_lr_rate.",
    )
    min_lr_rate: Fraction = Field(
        0.0,
        description="Share of the peak learning rate that cosine ends at; wsd begins there too.",
    )
    warmup_ratio: Fraction | None = Field(
        0.1, description="Share of steps spent on linear warmup; null with warmup_steps."
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="Steps spent on linear warmup, in place of warmup_ratio."
    )
    decay_steps: Interval = Field(
        0.1, description="Last steps of wsd, in which it decays; below 1, their share of all steps."
    )
    decay_shape: Literal["cosine", "linear", "1-sqrt"] = Field(
        "cosine",
        description="Curve of that decay: half a cosine, a line, or 1 - sqrt(its share done).",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip the gradient to this L2 norm; 0 turns clipping off."
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute activations in the backward pass: less memory, a third more FLOPs.",
    )
    tiled_mlp: PositiveInt | None = Field(
        None,
        description="Tokens per tile of a dense MLP, which is recomputed tile by tile; for long "
        "pairs.",
    )
    offload_activations: bool = Field(
        False,
        description="Keep the inputs of recomputed layers in host memory; for long pairs.",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="Ranks that share each row: a slice of its tokens each, in attention some of "
        "its heads; for long pairs.",
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="At a loss or gradient that is not finite: stop, or leave the step out.",
    )
    deterministic: bool = Field(
        False, description="Kernels that give the same bits every time, or an error; slower."
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="First and last optimizer step to trace with torch's profiler."
    )
    deepspeed: PathText = Field(
        "zero3",
        description="zero0, zero1, zero2, zero3, zero3_offload, zero3_hpz, or a DeepSpeed JSON.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, given: Any) -> Any:
        """The share is what it is by default unless there are steps, so that only one is set."""
        if not isinstance(given, Mapping):
            return given
        keys = cast("Mapping[str, Any]", given)
        if keys.get("warmup_ratio") is not None:
            return keys
        default = cls.model_fields["warmup_ratio"].default
        return {**keys, "warmup_ratio": default if keys.get("warmup_steps") is None else None}


def train_rules(train: TrainSection) -> Iterator[Rule]:
    """What must hold between the keys of this section."""
    yield (
        train.optimizer == "muon" and train.max_grad_norm > 0,
        f"train.max_grad_norm: {train.max_grad_norm} with train.optimizer muon",
        "0, because ZeRO would clip the orthogonalized step instead of the gradient",
        "Set it to 0.",
    )
    steps = train.profile_steps
    yield (
        steps is not None and steps[0] > steps[1],
        f"train.profile_steps: {list(steps or ())}",
        "the first step, then the last",
        "Swap them.",
    )
    yield (
        train.warmup_ratio is not None and train.warmup_steps is not None,
        f"train.warmup_steps: {train.warmup_steps} with train.warmup_ratio {train.warmup_ratio}",
        "one of them, because each says how long the warmup is",
        "Remove one, or set train.warmup_ratio to null.",
    )
    yield (
        train.min_lr_rate > 0 and train.lr_schedule not in ("cosine", "wsd"),
        f"train.min_lr_rate: {train.min_lr_rate} with lr_schedule {train.lr_schedule}",
        "0.0, because only cosine and wsd read it",
        "Remove the key, or set train.lr_schedule to cosine.",
    )
    yield (
        train.offload_activations and not train.gradient_checkpointing,
        "train.offload_activations: true with train.gradient_checkpointing false",
        "true, because what is kept in host memory are the inputs of recomputed layers",
        "Set train.gradient_checkpointing to true.",
    )
    for name in ("decay_steps", "decay_shape"):
        value, default = getattr(train, name), TrainSection.model_fields[name].default
        yield (
            value != default and train.lr_schedule != "wsd",
            f"train.{name}: {value} with lr_schedule {train.lr_schedule}",
            f"{default}, because only wsd reads it",
            "Remove the key, or set train.lr_schedule to wsd.",
        )


HeldOutMetric = Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]


class CheckpointSection(Section):
    every_steps: Interval = Field(
        200, description="Optimizer steps between checkpoints; below 1, their share of all steps."
    )
    keep: int = Field(2, ge=2, description="How many of the newest checkpoints to keep.")
    mode: Literal["async", "blocking"] = Field(
        "async",
        description="Write while training goes on, from a copy in host memory if it has room; or "
        "before.",
    )
    resume: FilePath | Literal["auto"] = Field(
        "auto", description="Checkpoint folder to resume from; auto takes the newest that verifies."
    )
    trusted_owners: list[NonNegativeInt] = Field(
        [],
        description="User ids whose checkpoints may be opened beside one's own; they can run code.",
    )
    probe_pairs: PositiveInt = Field(8, description="Pairs to score for each checkpoint's probe.")
    best_by: HeldOutMetric | None = Field(
        None, description="Held-out metric whose best checkpoint is kept as well."
    )


class EvalSection(Section):
    every_steps: Interval = Field(
        100, description="Optimizer steps between evaluations; below 1, their share of all steps."
    )
    on_start: bool = Field(False, description="Evaluate before the first step as well.")
    patience: PositiveInt | None = Field(
        None, description="End training after this many evaluations in a row without a better one."
    )
    min_delta: float = Field(
        0.0, ge=0, description="How much better an evaluation must be to reset patience."
    )
    samples_every_steps: Interval | None = Field(
        None,
        description="Optimizer steps, or share of them, between answers to held-out prompts; null "
        "for none.",
    )
    num_samples: PositiveInt = Field(2, description="Held-out prompts to answer during training.")
