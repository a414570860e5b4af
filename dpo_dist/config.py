"""The run config: frozen, strict, torch-free; every problem reported at once.

1. `load_config` reads the YAML and applies `section.key=value` overrides.
2. pydantic checks names, types and ranges; `_check_combinations` what spans sections.
3. The stages get a `RunConfig`; the rooms below them get their own section only.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpo_dist.errors import ConfigError

Policy = Literal["drop", "raise", "keep"]
PreferenceFormat = Literal[
    "auto", "conversational", "standard", "ultrafeedback", "orca", "hh", "stack_exchange"
]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class RunSection(Section):
    dir: Path = Field(description="Folder of this run; everything it writes lies inside.")
    seed: int = Field(42, ge=0, description="Seed of sample order, adapter init and dropout.")


class ModelSection(Section):
    path: str = Field(description="Model folder or hub id of the policy's base model.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of the forward; the optimizer keeps float32 copies."
    )
    attention: Literal["auto", "sdpa", "torch", "flash_attn"] = Field(
        "auto", description="Attention backend; auto takes the fastest that the model allows."
    )
    layout: Literal["auto", "packed", "padded"] = Field(
        "auto", description="auto packs with a shared prompt where the self-check at load allows."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    allow_pickle_weights: bool = Field(False, description="Load .bin weights (runs pickle code).")


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
    limit: PositiveInt | None = Field(None, description="Take at most this many rows.")
    weight: float = Field(
        1.0, gt=0, description="Share of the source's rows taken: 0.5 every second, 2 all twice."
    )


class DataSection(Section):
    train: list[SourceSection] = Field(min_length=1, description="Sources of training pairs.")
    eval: list[SourceSection] = Field([], description="Sources of held-out pairs.")
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
        "auto", description="Tokenising processes; auto: one a core, at most 16."
    )


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
    rank: PositiveInt = Field(16, description="LoRA rank r.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha; scale is alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Module names to adapt; all-linear: all but the head."
    )
    use_rslora: bool = Field(False, description="Scale alpha / sqrt(r) (rsLoRA).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    modules_to_save: list[str] = Field([], description="Modules trained in full beside LoRA.")


class ObjectiveSection(Section):
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = Field(
        "sigmoid", description="Loss over reward margins; docs/objectives.md has the formulas."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference label is wrong (cDPO)."
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
    learning_rate: float = Field(5e-7, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape after warm-up; cosine and linear end at 0."
    )
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps that warm up linearly.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
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


class EvalSection(Section):
    every_steps: PositiveInt = Field(100, description="Optimizer steps between evaluations.")


class ExportSection(Section):
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of exported weights.")
    max_shard_size_mib: PositiveInt = Field(4096, description="MiB of one safetensors file.")
    merge: bool = Field(True, description="After LoRA also write the merged model.")


class GenerateSection(Section):
    num_prompts: PositiveInt = Field(3, description="Held-out prompts to answer.")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, tokens.")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily.")


class LocalSection(Section):
    workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Ranks on this machine; auto: one a GPU, or 2 on CPU."
    )


class LoggingSection(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    every_steps: PositiveInt = Field(1, description="Optimizer steps between metric lines.")


class RestartSection(Section):
    max_restarts: int = Field(
        100, ge=0, description="Restarts of a submission that a launcher makes by itself."
    )
    max_without_progress: int = Field(
        3, ge=0, description="Restarts in a row without anything new committed."
    )


class SlurmJobSection(Section):
    partition: str | None = Field(None, description="sbatch --partition.")
    account: str | None = Field(None, description="sbatch --account.")
    nodes: PositiveInt | None = Field(None, description="sbatch --nodes.")
    tasks_per_node: PositiveInt | None = Field(
        None, description="sbatch --ntasks-per-node: one task a GPU."
    )
    gpus_per_node: int | None = Field(None, ge=0, description="sbatch --gpus-per-node.")
    cpus_per_task: PositiveInt | None = Field(None, description="sbatch --cpus-per-task.")
    time: str | None = Field(None, description="sbatch --time, in quotes: '12:00:00'.")
    options: list[str] = Field([], description="More sbatch options, such as --qos=high.")

    @field_validator("time", mode="before")
    @classmethod
    def _refuse_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f"slurm time: the number {value}, which is how YAML reads 12:00:00 without quotes; "
                "wanted text. Put it in quotes."
            )
        return value


class SlurmSection(SlurmJobSection):
    stages: dict[
        Literal["doctor", "prepare", "reference", "train", "export", "verify"], SlurmJobSection
    ] = Field({}, description="Keys of this section for one stage, as {train: {nodes: 8}}.")


class RaySection(Section):
    workers: PositiveInt = Field(1, description="Ranks of the distributed stages, one a GPU.")
    min_workers: PositiveInt | None = Field(
        None, description="Go on with as few as these after a loss; null waits for all."
    )
    gpus_per_worker: float = Field(1.0, ge=0, description="GPUs of one rank; 0 trains on CPUs.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs of one rank.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray spreads the ranks over nodes."
    )
    reference_tasks: int = Field(
        0, ge=0,
        description="Score the reference in this many independent Ray tasks; 0: one job of ranks.",
    )  # fmt: skip


class RunConfig(Section):
    """Everything a run needs; `dpo-dist config` explains each key."""

    run: RunSection
    model: ModelSection
    data: DataSection
    reference: ReferenceSection = ReferenceSection()  # pyright: ignore[reportCallIssue]
    adapter: AdapterSection | None = Field(None, description="LoRA; null trains all parameters.")
    objective: ObjectiveSection = ObjectiveSection()  # pyright: ignore[reportCallIssue]
    train: TrainSection = TrainSection()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointSection = CheckpointSection()  # pyright: ignore[reportCallIssue]
    eval: EvalSection = EvalSection()  # pyright: ignore[reportCallIssue]
    export: ExportSection = ExportSection()  # pyright: ignore[reportCallIssue]
    generate: GenerateSection = GenerateSection()  # pyright: ignore[reportCallIssue]
    local: LocalSection = LocalSection()  # pyright: ignore[reportCallIssue]
    logging: LoggingSection = LoggingSection()  # pyright: ignore[reportCallIssue]
    restart: RestartSection = RestartSection()  # pyright: ignore[reportCallIssue]
    slurm: SlurmSection = SlurmSection()  # pyright: ignore[reportCallIssue]
    ray: RaySection = RaySection()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _check_combinations(self) -> "RunConfig":
        smoothing, loss = self.objective.label_smoothing, self.objective.loss
        if smoothing > 0 and loss not in ("sigmoid", "sigmoid_norm"):
            raise ValueError(
                f"objective.label_smoothing: {smoothing} with loss {loss}; wanted 0, or loss "
                "sigmoid or sigmoid_norm. Only these two are defined with smoothed labels."
            )
        fewest, workers = self.ray.min_workers, self.ray.workers
        if fewest is not None and fewest > workers:
            raise ValueError(
                f"ray.min_workers: {fewest} with ray.workers {workers}; wanted at most that many."
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run config and its overrides; raises ConfigError naming every problem at once."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}",
            "a readable YAML run config",
            "Start from one in examples/.",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is not YAML ({where})", "a YAML mapping", "Correct it."
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a {type(raw).__name__}",
            "a YAML mapping of sections",
            "Start from one in examples/.",
        )
    settings = cast(dict[str, Any], raw)
    for override in overrides:
        _apply_override(settings, override)
    return parse_config(settings, str(path))


def parse_config(raw: dict[str, Any], origin: str = "config") -> RunConfig:
    """Checks a mapping; raises ConfigError with one line per problem."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(
            f"{origin} has {len(problems)} problem{'s' * (len(problems) > 1)}:{listed}\n ",
            "keys and values as `dpo-dist config` explains them",
            "Correct the lines above.",
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"override {override!r}",
            "section.key=value",
            "For example train.learning_rate=1e-6.",
        )
    *parents, leaf = name.split(".")
    target: Any = raw
    for depth, part in enumerate(parents):
        target = _child(target, part, ".".join(parents[: depth + 1]), override)
    value = yaml.safe_load(text) if text else None
    if isinstance(target, list):
        entries = cast(list[Any], target)
        entries[_index(entries, leaf, override)] = value
    else:
        target[leaf] = value


def _child(target: Any, part: str, path: str, override: str) -> Any:
    if isinstance(target, list):
        entries = cast(list[Any], target)
        return entries[_index(entries, part, override)]
    child: Any = target.setdefault(part, {})
    if child is None:  # `adapter: null` becomes a section once a key of it is set
        child = target[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"override {override!r} goes into {path}, which is {child!r}",
            "a section",
            "Override the key itself.",
        )
    return cast(Any, child)


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(
            f"override {override!r}: {part!r} is no entry of a list of {len(target)}",
            f"a number from 0 to {len(target) - 1}",
            "For example data.train.0.limit=100.",
        )
    return int(part)


def _explain(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = _names_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(valid))}"
        return f"{location}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{location}: missing, and it has no default"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{location}: {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def section_types(annotation: Any) -> Iterator[type[Section]]:
    """The section classes inside an annotation such as `list[SourceSection]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from section_types(argument)


def _names_at(location: Sequence[Any]) -> list[str]:
    section: type[Section] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))  # None: an index, or a key of a mapping
        if field is not None:
            section = next(section_types(field.annotation), section)
    return list(section.model_fields)
