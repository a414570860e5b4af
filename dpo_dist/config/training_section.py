"""Sections of a run config about the model, the reference and the training."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from dpo_dist.config.section import Fraction, PositiveInt, Section

Metric = Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]


class ModelSection(Section):
    path: str = Field(description="Model folder or hub id of the policy's base model.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of the forward; the optimizer keeps float32 copies."
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="nf4: QLoRA, the frozen base in 4 bits (needs adapter and bitsandbytes)."
    )
    attention: Literal["auto", "sdpa", "torch", "flash_attn"] = Field(
        "auto", description="Attention backend; auto takes the fastest that the model allows."
    )
    layout: Literal["auto", "packed", "padded"] = Field(
        "auto", description="auto packs with a shared prompt where the self-check at load allows."
    )
    add_tokens: list[str] = Field(
        [], description="Special tokens to add; their embeddings start as the mean of the others."
    )
    pad_vocab_to_multiple: PositiveInt | None = Field(
        None, description="Lengthen the embeddings to a multiple of this many tokens."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    allow_pickle_weights: bool = Field(False, description="Load .bin weights (runs pickle code).")


class ReferenceSection(Section):
    model: str | None = Field(
        None, description="Reference model folder or hub id; the starting policy by default."
    )
    store_dir: Path | None = Field(
        None, description="Folder of the reference store, may be shared; run.dir by default."
    )
    sharding: Literal["auto", "whole", "zero3"] = Field(
        "auto", description="Whole model on every rank, or ZeRO-3 inference; auto by size."
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Packed tokens of one scoring batch; twice train's by default."
    )
    part: str | None = Field(
        None,
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="Score only this part of the pairs, such as 2/8, without the others' help.",
    )


class AdapterSection(Section):
    path: str | None = Field(
        None, description="Folder or hub id of a LoRA adapter to start from, such as after SFT."
    )
    start: Literal["continue", "merge"] = Field(
        "continue",
        description="Train on the adapter at path, or merge it and train a fresh one on that.",
    )
    rank: PositiveInt = Field(16, description="LoRA rank r.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha; scale is alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Module names to adapt; all-linear: all but the head."
    )
    use_rslora: bool = Field(False, description="Scale alpha / sqrt(r) (rsLoRA).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    modules_to_save: list[str] = Field([], description="Modules trained in full beside LoRA.")
    exclude_modules: list[str] = Field([], description="Module names that get no adapter.")
    target_parameters: list[str] = Field(
        [], description="Parameters to adapt that are no layer, such as mlp.experts.down_proj."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        {}, description="Other ranks for names that end so: {down_proj: 32}."
    )
    alpha_pattern: dict[str, float] = Field(
        {}, description="Other alphas for names that end so: {down_proj: 64}."
    )


class TrainSection(Section):
    num_epochs: float = Field(1.0, gt=0, description="Passes over the training pairs.")
    max_steps: PositiveInt | None = Field(None, description="Stop here if epochs last longer.")
    global_batch_size: PositiveInt = Field(
        64, description="Pairs of one optimizer step over all ranks."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192, description="Packed tokens of one forward on one rank; changes memory, not numbers."
    )
    optimizer: Literal[
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon"
    ] = Field("adamw", description="docs/memory.md says what each holds, and where it works.")
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape after warm-up; cosine and linear end at 0."
    )
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps that warm up linearly.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip the gradient's L2 norm here; 0 does not clip."
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in backward: less memory, a third more FLOPs."
    )
    deepspeed: str = Field(
        "zero3", description="zero0, zero1, zero2, zero3, zero3_offload, zero3_hpz, or a JSON path."
    )


class CheckpointSection(Section):
    every_steps: PositiveInt = Field(200, description="Optimizer steps between checkpoints.")
    keep: int = Field(2, ge=2, description="Committed checkpoints to keep.")
    resume: Path | Literal["auto"] = Field(
        "auto", description="auto: the newest that verifies; or one checkpoint's folder."
    )
    probe_pairs: PositiveInt = Field(8, description="Pairs scored into every checkpoint's probe.")
    best_by: Metric | None = Field(
        None, description="Also keep the checkpoint with the best of this held-out metric."
    )


class EvalSection(Section):
    every_steps: PositiveInt = Field(100, description="Optimizer steps between evaluations.")
    patience: PositiveInt | None = Field(
        None, description="End training after so many evaluations in a row without a better one."
    )
    min_delta: float = Field(
        0.0, ge=0, description="Better means better by more than this, for patience."
    )
    samples_every_steps: PositiveInt | None = Field(
        None, description="Optimizer steps between answers to held-out prompts; null: none."
    )
    num_samples: PositiveInt = Field(2, description="Held-out prompts to answer in training.")
