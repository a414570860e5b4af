"""The README.md of an exported model: data, settings, metrics and versions, with Hub metadata."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_dist import __version__
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.rows.joined_rows import is_pattern
from dpo_dist.metrics.curves import Line, displacement, spread
from dpo_dist.run.exports import ExportKind

NUM_CURVE_ROWS = 6
CURVE = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
_LOADING = {
    "adapter": """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
""",
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
""",
}
_INTRODUCTION = {
    "adapter": "A LoRA adapter for {base}, trained with direct preference optimization (DPO).",
    "merged": "{base} after direct preference optimization (DPO) with a LoRA adapter, merged.",
    "full": "{base} after direct preference optimization (DPO) of all its parameters.",
}


@dataclass(frozen=True)
class Training:
    """What a run left behind that its card tells."""

    step: int
    epoch: float
    versions: Mapping[str, str]
    report: Mapping[str, Any]  # of the prepare stage
    metrics: Sequence[Line]  # lines of the metrics file
    plots: Mapping[str, str]  # heading of a plot -> its file, relative to the card


def base_model_name(config: RunConfig) -> str:
    """The hub id of the base model, or its folder's name: a card tells no paths."""
    if config.export.base_model is not None:
        return config.export.base_model
    return _name_of(config.model.path)


def _name_of(path: str) -> str:
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path


def model_card(config: RunConfig, kind: ExportKind, dtype: str, training: Training) -> str:
    """Markdown with YAML front matter as the Hugging Face Hub reads it."""
    base = base_model_name(config)
    loading = _LOADING["adapter" if kind == "adapter" else "merged"]
    versions = {"dpo-dist": __version__, **training.versions}
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config, kind, base), sort_keys=False)}---",
        f"# {config.run.dir.resolve().name}",
        _INTRODUCTION[kind].format(base=base)
        + _start_of(config)
        + f" Weights are {dtype}, from step {training.step:,} ({training.epoch:.2f} epochs).",
        f"```python\n{loading}```",
        "## Data",
        _data_table(training.report),
        f"Longest pair: {training.report['max_length']} tokens.",
        "## Settings",
        _table(("setting", "value"), _settings(config)),
        *_results(training.metrics, training.plots),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _start_of(config: RunConfig) -> str:
    """What training started from beside the base model, as sentences."""
    said = ""
    adapter, tokens = config.adapter, config.model.add_tokens
    if adapter is not None and adapter.path is not None:
        verb = {"continue": "continued from", "merge": "started from the merged"}[adapter.start]
        said += f" Training {verb} adapter {_name_of(adapter.path)}."
    if tokens:
        said += f" Added tokens: {', '.join(f'`{token}`' for token in tokens)}."
    return said


def _front_matter(config: RunConfig, kind: ExportKind, base: str) -> dict[str, Any]:
    tags = ["dpo", "preference-optimization", "dpo-dist", *(["lora"] if config.adapter else [])]
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    paths = {source.path for source in config.data.train}
    hub_ids = sorted(
        path
        for path in paths
        if path.count("/") == 1 and not is_pattern(path) and not Path(path).exists()
    )
    return front | ({"datasets": hub_ids} if hub_ids else {})


def _data_table(report: Mapping[str, Any]) -> str:
    rows = []
    for split, counts in report["splits"].items():
        for name, source in counts["sources"].items():
            numbers = (f"{source['rows']:,}", f"{source['pairs']:,}", _dropped(source))
            rows.append((split, name, source["format"], *numbers))
    return _table(("split", "source", "format", "rows", "pairs", "dropped"), rows)


def _dropped(source: Mapping[str, Any]) -> str:
    found = [f"{number:,} {reason}" for reason, number in source["dropped"].items() if number]
    return ", ".join(found) or "-"


def _settings(config: RunConfig) -> list[tuple[str, str]]:
    sections = {
        "objective": config.objective.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude_none=True),
        "adapter": _adapter_settings(config),
        "model": {"dtype": config.model.dtype},
        "run": {"seed": config.run.seed},
    }
    return [
        (f"{section}.{key}", _plain(value))
        for section, values in sections.items()
        for key, value in values.items()
    ]


def _adapter_settings(config: RunConfig) -> dict[str, Any]:
    """What a fresh adapter was made with; one that was continued has settings of its own."""
    adapter = config.adapter
    if adapter is None:
        return {}
    values = adapter.model_dump(mode="json")
    if adapter.path is None:
        return {k: v for k, v in values.items() if k not in ("path", "start")}
    values["path"] = _name_of(adapter.path)
    kept = ("path", "start", "dropout") if adapter.start == "continue" else values
    return {key: values[key] for key in kept}


def _results(metrics: Sequence[Line], plots: Mapping[str, str]) -> Iterable[str]:
    """The curves, a few points of them, what they warn of, and the last evaluation."""
    curve = [line for line in metrics if "loss" in line]
    if curve:
        rows = [
            (f"{line['step']}", *(_plain(line.get(name)) for name in CURVE))
            for line in spread(curve, NUM_CURVE_ROWS)
        ]
        yield "## Training"
        if warning := displacement(metrics):
            yield f"> **Note:** {warning}"
        if plots:
            yield "\n".join(f"![{title}]({path})" for title, path in plots.items())
        yield _table(("step", *CURVE), rows)
    held_out = [line for line in metrics if "eval_loss" in line]
    if held_out:
        names = [name for name in held_out[-1] if name.startswith("eval_")]
        yield f"## Held-out pairs at step {held_out[-1]['step']}"
        yield _table(
            ("metric", "value"),
            [(name.removeprefix("eval_"), _plain(held_out[-1][name])) for name in names],
        )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
