"""The run config: frozen, strict, torch-free; every problem reported at once.

1. `load_config` reads the YAML and applies `section.key=value` overrides.
2. pydantic checks names, types and ranges; `contradictions` what spans keys.
3. The stages get a `RunConfig`; the rooms below them get their own section only.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from dpo_dist.config.cluster_section import LocalSection, RaySection, RestartSection, SlurmSection
from dpo_dist.config.data_section import DataSection
from dpo_dist.config.objective_section import ObjectiveSection, objective_contradictions
from dpo_dist.config.output_section import (
    ExportSection,
    GenerateSection,
    LoggingSection,
    RunSection,
)
from dpo_dist.config.section import Section
from dpo_dist.config.training_section import (
    AdapterSection,
    CheckpointSection,
    EvalSection,
    ModelSection,
    ReferenceSection,
    TrainSection,
)
from dpo_dist.errors import ConfigError


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
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n  ".join(problems))
        return self


def contradictions(config: RunConfig) -> Iterator[str]:
    """What is wrong between keys that are right one by one: found, expected, remedy."""
    objective = config.objective
    yield from objective_contradictions(objective)
    if objective.reference_free and config.reference.model is not None:
        yield (
            f"reference.model: {config.reference.model} with loss {', '.join(objective.names)}, "
            "which has no reference; expected none. Leave it out."
        )
    if objective.router_aux_loss_coef and config.train.gradient_checkpointing:
        yield (
            "train.gradient_checkpointing: true with objective.router_aux_loss_coef "
            f"{objective.router_aux_loss_coef}; expected false, because the routers of a "
            "recomputed "
            "layer pass no gradient on. Set train.gradient_checkpointing to false."
        )
    best_by, checkpoint, evaluation = config.checkpoint.best_by, config.checkpoint, config.eval
    if best_by is not None and checkpoint.every_steps % evaluation.every_steps:
        yield (
            f"checkpoint.every_steps: {checkpoint.every_steps} with eval.every_steps "
            f"{evaluation.every_steps} and checkpoint.best_by {best_by}; expected a multiple of "
            "eval.every_steps. A checkpoint needs an evaluation to be compared by."
        )
    for key, expected in (
        ("eval.patience", evaluation.patience is not None),
        ("export.checkpoint: best", config.export.checkpoint == "best"),
    ):
        if expected and best_by is None:
            yield f"{key} without checkpoint.best_by; expected the metric to go by. Set it."
    yield from _adapter_contradictions(config.adapter, config.model)
    for split, sections in (("train", config.data.train), ("eval", config.data.eval)):
        for index, section in enumerate(sections):
            if section.streaming and section.format == "labelled":
                yield (
                    f"data.{split}.{index}.streaming: true with format labelled; expected a source "
                    "that can be read by position, since a partner may stand anywhere. Remove "
                    "streaming, or pair the rows beforehand."
                )
    made = ["full"]
    if config.adapter is not None:
        made = ["adapter", "merged"] if config.export.merge else ["adapter"]
    if config.export.hub_folder not in ("auto", *made):
        yield (
            f"export.hub_folder: {config.export.hub_folder}, which this run does not export; "
            f"expected auto or {' or '.join(made)}."
        )
    fewest, workers = config.ray.min_workers, config.ray.workers
    if fewest is not None and fewest > workers:
        yield (f"ray.min_workers: {fewest} with ray.workers {workers}; expected at most that many.")
    if config.model.quantization is not None and config.adapter is None:
        yield (
            f"model.quantization: {config.model.quantization} without an adapter section; expected "
            "one, because quantized weights are frozen. Add `adapter: {}`."
        )
    elif config.model.quantization is not None and config.adapter and config.adapter.use_dora:
        yield (
            "adapter.use_dora: true with model.quantization; expected LoRA. DoRA trains the "
            "lengths "
            "of the quantized rows, which the full-precision rows of the merge do not have."
        )
    if config.train.optimizer == "muon" and config.train.max_grad_norm > 0:
        yield (
            f"train.max_grad_norm: {config.train.max_grad_norm} with train.optimizer muon; "
            "expected "
            "0. ZeRO would clip the orthogonalized step, not the gradient."
        )


def _adapter_contradictions(adapter: AdapterSection | None, model: ModelSection) -> Iterator[str]:
    if adapter is None:
        return
    if adapter.path is None and adapter.start == "merge":
        yield "adapter.start: merge without adapter.path; expected an adapter to merge. Set it."
    if adapter.path is not None and adapter.start == "continue":
        own = {"path", "start", "dropout"}
        for name, field in AdapterSection.model_fields.items():
            value = getattr(adapter, name)
            if name not in own and value != field.get_default(call_default_factory=True):
                yield (
                    f"adapter.{name}: {value} with adapter.start continue; the adapter at path has "
                    "its own. Leave the key out, or set adapter.start=merge for a fresh adapter."
                )
    fresh = adapter.path is None or adapter.start == "merge"
    if model.add_tokens and fresh and not adapter.modules_to_save:
        yield (
            "model.add_tokens: with an adapter that leaves the embeddings frozen, so that the new "
            "tokens would all stay the same; expected them trained. Name embeddings and head in "
            "adapter.modules_to_save, such as [embed_tokens, lm_head]."
        )


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
        problems = [line for problem in error.errors() for line in _explain(problem).split("\n  ")]
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(
            f"{origin} has {len(problems)} problem{'s' * (len(problems) > 1)}:{listed}",
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
    try:
        value = yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        where = " ".join(str(error).split())
        raise ConfigError(
            f"override {override!r} is not YAML ({where})",
            "section.key=value, the value as in a YAML file",
            "Correct it; text that is not YAML goes in quotes of its own: \"run.dir='[x'\".",
        ) from None
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


def _names_at(location: Sequence[Any]) -> list[str]:
    section: type[Section] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))  # None: an index, or a key of a mapping
        if field is not None:
            section = next(section_types(field.annotation), section)
    return list(section.model_fields)


def section_types(annotation: Any) -> Iterator[type[Section]]:
    """The section classes inside an annotation such as `list[SourceSection]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from section_types(argument)


def scoring_budget(config: RunConfig) -> int:
    """Packed tokens of one forward without gradients: nothing is kept for a backward."""
    return config.reference.micro_batch_tokens or 2 * config.train.micro_batch_tokens
