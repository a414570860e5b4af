"""The run config: frozen, strict, torch-free; every problem is reported at once.

1. `load_config` reads the YAML and applies `section.key=value` overrides.
2. pydantic checks names, types and ranges; the rules check what spans keys.
3. The stages get a `RunConfig`; the rooms below them get only their own section.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import Field, ValidationError, model_validator

from dpo_dist.config.cluster_section import (
    LocalSection,
    RaySection,
    RestartSection,
    SlurmSection,
    ray_rules,
)
from dpo_dist.config.data_section import DataSection, data_rules
from dpo_dist.config.objective_section import ObjectiveSection, objective_rules
from dpo_dist.config.output_section import (
    ExportSection,
    GenerateSection,
    LoggingSection,
    RunSection,
)
from dpo_dist.config.overrides import apply_override, refuse_secrets
from dpo_dist.config.section import Rule, Section, broken
from dpo_dist.config.training_section import (
    AdapterSection,
    CheckpointSection,
    EvalSection,
    ModelSection,
    ReferenceSection,
    TrainSection,
    train_rules,
)
from dpo_dist.config.watchdog_section import WatchdogSection
from dpo_dist.errors import ConfigError
from dpo_dist.parsing import parse_yaml


class RunConfig(Section):
    """Everything a run needs; `dpo-dist config` explains each key."""

    run: RunSection
    model: ModelSection
    data: DataSection
    reference: ReferenceSection = ReferenceSection()  # pyright: ignore[reportCallIssue]
    adapter: AdapterSection | None = Field(
        None, description="LoRA settings; null trains all parameters."
    )
    objective: ObjectiveSection = ObjectiveSection()  # pyright: ignore[reportCallIssue]
    train: TrainSection = TrainSection()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointSection = CheckpointSection()  # pyright: ignore[reportCallIssue]
    eval: EvalSection = EvalSection()  # pyright: ignore[reportCallIssue]
    export: ExportSection = ExportSection()  # pyright: ignore[reportCallIssue]
    generate: GenerateSection = GenerateSection()  # pyright: ignore[reportCallIssue]
    local: LocalSection = LocalSection()  # pyright: ignore[reportCallIssue]
    logging: LoggingSection = LoggingSection()  # pyright: ignore[reportCallIssue]
    restart: RestartSection = RestartSection()  # pyright: ignore[reportCallIssue]
    watchdog: WatchdogSection = WatchdogSection()  # pyright: ignore[reportCallIssue]
    slurm: SlurmSection = SlurmSection()  # pyright: ignore[reportCallIssue]
    ray: RaySection = RaySection()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _check_combinations(self) -> "RunConfig":
        rules = itertools.chain(
            data_rules(self.data), objective_rules(self.objective), ray_rules(self.ray),
            _rules(self), train_rules(self.train),
        )  # fmt: skip
        if problems := list(broken(rules)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def scoring_tokens(self) -> int:
        """Packed tokens of a forward without gradients: twice as many, as it keeps nothing."""
        return self.reference.micro_batch_tokens or 2 * self.train.micro_batch_tokens


def _rules(config: RunConfig) -> Iterator[Rule]:
    """What must hold between keys of different sections."""
    objective, train, checkpoint = config.objective, config.train, config.checkpoint
    yield (
        objective.reference_free and config.reference.model is not None,
        f"reference.model: {config.reference.model} with loss {', '.join(objective.names)}",
        "null, because this loss has no reference",
        "Remove it.",
    )
    yield (
        objective.router_aux_loss_coef > 0 and train.gradient_checkpointing,
        "train.gradient_checkpointing: true with objective.router_aux_loss_coef "
        f"{objective.router_aux_loss_coef}",
        "false, because recomputed layers pass no gradient to their routers",
        "Set it to false.",
    )
    if checkpoint.best_by is not None:
        yield _meets_evaluations(checkpoint, config.eval.every_steps)
    for needs_metric, found in (
        (config.eval.patience is not None, f"eval.patience: {config.eval.patience}"),
        (config.export.checkpoint == "best", "export.checkpoint: best"),
    ):
        yield (
            needs_metric and checkpoint.best_by is None,
            f"{found} without checkpoint.best_by",
            "a metric to compare by",
            "Set checkpoint.best_by, for example to eval_loss.",
        )
    merged = ["adapter", "merged"] if config.export.merge else ["adapter"]
    made = ["auto", "full"] if config.adapter is None else ["auto", *merged]
    yield (
        config.export.hub_folder not in made,
        f"export.hub_folder: {config.export.hub_folder}, which this run does not export",
        " or ".join(made),
        "Set it to one of these.",
    )
    yield from _adapter_rules(config.adapter, config.model)


def _meets_evaluations(checkpoint: CheckpointSection, every: int | float) -> Rule:
    saved = checkpoint.every_steps
    found = (
        f"checkpoint.every_steps: {saved} with eval.every_steps {every} and checkpoint.best_by "
        f"{checkpoint.best_by}"
    )
    if isinstance(saved, float) or isinstance(every, float):
        return (
            saved != every,
            found,
            "the same share for both, because checkpoints are compared by their evaluations",
            f"Set it to {every}, for example.",
        )
    return (
        saved % every > 0,
        found,
        "a multiple of eval.every_steps, because checkpoints are compared by their evaluations",
        f"Set it to {every * (saved // every + 1)}, for example.",
    )


def _adapter_rules(adapter: AdapterSection | None, model: ModelSection) -> Iterator[Rule]:
    quantized = model.quantization is not None
    if adapter is None:
        yield (
            quantized,
            f"model.quantization: {model.quantization} without an adapter section",
            "one, because quantized weights are frozen",
            "Add `adapter: {}`.",
        )
        return
    yield (
        quantized and adapter.use_dora,
        "adapter.use_dora: true with model.quantization",
        "false, because DoRA would train the lengths of the quantized rows, and the merge has "
        "full-precision rows",
        "Set it to false.",
    )
    yield (
        adapter.path is None and adapter.start == "merge",
        "adapter.start: merge without adapter.path",
        "an adapter to merge",
        "Set adapter.path.",
    )
    continued = adapter.path is not None and adapter.start == "continue"
    for name, field in AdapterSection.model_fields.items():
        value, default = getattr(adapter, name), field.get_default(call_default_factory=True)
        yield (
            continued and name not in ("path", "start", "dropout") and value != default,
            f"adapter.{name}: {value} with adapter.start continue",
            "no value, because the adapter at adapter.path has its own",
            "Remove the key, or set adapter.start=merge to train a fresh adapter.",
        )
    yield (
        bool(model.add_tokens) and not continued and not adapter.modules_to_save,
        f"model.add_tokens: {model.add_tokens} with an adapter that leaves the embeddings frozen",
        "trained embeddings, because the new tokens would otherwise stay identical",
        "Add the embeddings and the head to adapter.modules_to_save, for example "
        "[embed_tokens, lm_head].",
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run config and applies overrides; raises ConfigError with every problem at once."""
    try:
        raw: Any = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}",
            "a readable YAML run config",
            "Start from one in examples/.",
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not YAML ({error})", "a YAML mapping of sections", "Fix its syntax."
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a {type(raw).__name__}",
            "a YAML mapping of sections",
            "Start from one in examples/.",
        )
    settings = cast(dict[str, Any], raw)
    for override in overrides:
        apply_override(settings, override)
    refuse_secrets(settings)
    return parse_config(settings, str(path))


def parse_config(raw: dict[str, Any], origin: str = "config") -> RunConfig:
    """Checks a mapping; raises ConfigError with one line per problem."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(problem).splitlines()]
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(
            f"{origin} has {len(problems)} problem{'s' * (len(problems) > 1)}:{listed}",
            "keys and values that `dpo-dist config` lists",
            "Fix the lines above.",
        ) from None


def _explain(problem: Any) -> str:
    """The line, or lines, that a reader gets for one of pydantic's errors."""
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = _names_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(valid))}"
        return f"{location}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{location}: missing; this key is required"
    if problem["type"] == "value_error":  # ours: of one key, or of several
        return f"{location}: {problem['ctx']['error']}".removeprefix(": ")
    said = problem["msg"].partition(", unable")[0]
    said = re.sub(r"^Input should be (?=greater|less)", "expected a number ", said)
    said = re.sub(r"^Input should be", "expected", said)
    return f"{location}: {problem['input']!r}; {said[0].lower()}{said[1:]}"


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
