"""A sweep: the product of several values, a run for every point, one reference pass for all.

    dpo-dist sweep run.yaml objective.beta=0.05,0.1,0.5 train.learning_rate=5e-7,1e-6

1. `plan_sweep` splits the values, forms their product and checks the config of every point.
2. Points whose pairs and models are the same share their inputs: a run folder that is prepared and
   scored once. Its pairs, and the base model if `prepare` makes one, are linked into the points'
   folders; the reference store is run.dir's.
3. What is done is read from each point's status.json, so the same command goes on where it was.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.keys import to_yaml
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.model_files.of_run import makes_base
from dpo_dist.reference.contract import store_root
from dpo_dist.run.manifest import digest_of
from dpo_dist.run.pipeline import STAGES, Stage
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status

INPUT_STAGES, POINT_STAGES = STAGES[:2], STAGES[2:]
# The sweep sets these itself, or they say which part of one run a process does.
NOT_SWEPT = ("run.dir", "reference.store_dir", "reference.part")
# of an adapter: what says which parameters train
CHOOSING = {"target_modules", "modules_to_save", "exclude_modules", "target_parameters"}
UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")
MAX_NAME = 40  # characters of one value in a folder's name
MAX_SHOWN = 12  # problems of one kind of mistake are alike for all points


@dataclass(frozen=True)
class Run:
    """One run folder of a sweep, and the arguments after `dpo-dist STAGE run.yaml` that make it."""

    name: str
    config: RunConfig
    overrides: tuple[str, ...]

    @property
    def paths(self) -> RunDir:
        return RunDir(self.config.run.dir)


@dataclass(frozen=True)
class Point(Run):
    """A run of the sweep: the value of every swept key, and the run whose pairs it trains on."""

    values: dict[str, Any]
    inputs: Run


@dataclass(frozen=True)
class Sweep:
    """All points in the order of the values, and the runs that they take their inputs from."""

    root: RunDir
    keys: tuple[str, ...]
    points: tuple[Point, ...]
    train_only: bool

    @property
    def inputs(self) -> list[Run]:
        return list({point.inputs.name: point.inputs for point in self.points}.values())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What a point does by itself."""
        return POINT_STAGES[:1] if self.train_only else POINT_STAGES

    def points_of(self, inputs: Run) -> list[Point]:
        return [point for point in self.points if point.inputs.name == inputs.name]


@dataclass(frozen=True)
class State:
    """How far a point is: `done`, `failed`, `stopped`, `running` or `waiting`; and why it failed.

    A point whose run was killed reads `running`: nobody was left to write what became of it.
    """

    name: str
    error: str = ""


def plan_sweep(config_path: Path, overrides: Sequence[str], *, train_only: bool = False) -> Sweep:
    """The points of a sweep; nothing is written.

    Raises ConfigError with the problems of all points at once.
    """
    fixed, swept = _split(overrides)
    combinations = [dict(zip(swept, texts, strict=True)) for texts in product(swept)]
    configs: list[RunConfig] = []
    problems: Counter[str] = Counter()
    for texts in combinations:
        try:
            configs.append(load_config(config_path, [*fixed, *_assign(texts)]))
        except ConfigError as error:
            problems.update(error.found.strip().split("\n  ")[1:] or [error.found])
    if problems:
        shown = [f"{text} ({number} of the points)" for text, number in problems.items()]
        more = [f"... and {len(shown) - MAX_SHOWN} more"] if len(shown) > MAX_SHOWN else []
        listed = "".join(f"\n  {line}" for line in shown[:MAX_SHOWN] + more)
        raise ConfigError(
            f"{len(combinations) - len(configs)} of the sweep's {len(combinations)} points are not "
            f"usable:{listed}",
            "values that every point can have",
            "Correct the lines above; nothing was started.",
        )
    values = [{key: _value(config, key) for key in swept} for config in configs]
    _check(configs, values)
    names = [_point_name(own) for own in values]
    root = RunDir(configs[0].run.dir.absolute())
    shared = f"reference.store_dir={_quoted(str(store_root(configs[0]).absolute()))}"
    points: list[Point] = []
    for config, texts, own, name in zip(configs, combinations, values, names, strict=True):
        common = (*fixed, *_assign(texts), shared)
        inputs = _run(config_path, f"inputs-{_inputs_digest(config)}", root, common)
        point = _run(config_path, name, root, common)
        points.append(Point(name, point.config, point.overrides, own, inputs))
    return Sweep(root, tuple(swept), tuple(points), train_only)


def product(swept: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, ...]]:
    """All combinations; the last key's values change fastest."""
    return itertools.product(*swept.values())


def split_values(text: str) -> list[str]:
    """The values of `0.1,0.5`: apart at commas that are not inside brackets or quotes."""
    try:
        node = yaml.compose(f"[{text}]")
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(
            f"values {text!r} are not a YAML list ({where})",
            "values with commas between them",
            "Put a value that holds commas into quotes or brackets.",
        ) from None
    assert isinstance(node, yaml.SequenceNode), node
    marks = [(child.start_mark.index - 1, child.end_mark.index - 1) for child in node.value]
    return [text[start:end] for start, end in marks] if len(marks) > 1 else [text]


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(overrides of all points, swept key -> its values)."""
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        texts = split_values(text)
        if len(texts) == 1:
            fixed.append(override)
            continue
        if key in NOT_SWEPT or key in swept:
            wrong = "cannot be swept" if key in NOT_SWEPT else "is swept twice"
            raise ConfigError(
                f"{key} {wrong}", "keys that differ between runs, each once",
                "Leave it out, or give it one value.",
            )  # fmt: skip
        swept[key] = texts
    if not swept:
        raise ConfigError(
            "no key has several values",
            "at least one such as objective.beta=0.05,0.1,0.5",
            "For a single run use `dpo-dist run`.",
        )
    return fixed, swept


def _assign(texts: Mapping[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in texts.items()]


def _check(configs: Sequence[RunConfig], values: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError for a sweep that would push, or two points that are the same."""
    if configs[0].export.push_to_hub is not None:
        raise ConfigError(
            "export.push_to_hub is set: all points would go to one repository",
            "a sweep that publishes nothing",
            "Set it to null here, then `dpo-dist push` the point you choose.",
        )
    seen: dict[str, int] = {}
    for number, own in enumerate(values):
        first = seen.setdefault(digest_of(own), number)
        if first != number:
            shown = ", ".join(f"{key}={value}" for key, value in own.items())
            raise ConfigError(
                f"{shown} stands in the sweep twice", "every value once", "Leave one out."
            )


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _point_name(values: Mapping[str, Any]) -> str:
    """`beta=0.05,learning_rate=5e-07`: the last part of each key unless two keys share it."""
    leaves = Counter(key.rpartition(".")[2] for key in values)
    parts: list[str] = []
    for key, value in values.items():
        leaf = key.rpartition(".")[2]
        text = value if isinstance(value, str) else json.dumps(value)
        safe = UNSAFE.sub("-", text).strip("-")
        if safe != text or len(safe) > MAX_NAME:
            safe = f"{safe[-MAX_NAME:]}-{digest_of(value)[:6]}"
        parts.append(f"{leaf if leaves[leaf] == 1 else key}={safe}")
    return ",".join(parts)


def _inputs_digest(config: RunConfig) -> str:
    """What pairs, base model and reference log-probs depend on, as far as the config tells."""
    data = config.data.model_dump(mode="json", exclude={"num_workers"})
    data["train"] = [source.identity() for source in config.data.train]
    data["eval"] = [source.identity() for source in config.data.eval]
    model = config.model.model_dump(mode="json", exclude={"attention"})
    adapter, objective = config.adapter, config.objective
    start = (adapter.path, adapter.start) if adapter is not None and adapter.path else None
    # prepare refuses added tokens that the adapter would leave frozen
    trained = adapter.model_dump(mode="json", include=CHOOSING) if adapter is not None else None
    reference = [config.reference.model, objective.reference_free, objective.ld_alpha]
    return digest_of([data, model, start, trained if model["add_tokens"] else None, reference])[:8]


def _run(config_path: Path, name: str, root: RunDir, common: Sequence[str]) -> Run:
    overrides = (*common, f"run.dir={_quoted(str(root.sweep_run_dir(name)))}")
    return Run(name, load_config(config_path, overrides), overrides)


def _quoted(path: str) -> str:
    """A path as an override's text: YAML would read some names as something else."""
    return path if yaml.safe_load(path) == path else json.dumps(path)


def links_of(point: Point) -> dict[Path, Path]:
    """link -> target of what a point reads from its inputs; by relative names, to move the sweep.

    The pairs, and the base model that `prepare` made, if any.
    """
    own = [point.paths.pairs_dir, *([point.paths.base_dir] if makes_base(point.config) else [])]
    return {link: Path("..") / point.inputs.name / link.name for link in own}


def link_pairs(point: Point) -> None:
    """Links the shared pairs and base model into a point's folder.

    Raises ArtifactError when something that is not a link stands there.
    """
    for link, target in links_of(point).items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            if link.readlink() == target:
                continue
            link.unlink()
        elif link.exists():
            raise ArtifactError(
                f"{link} is a folder of its own",
                f"a link to {point.inputs.paths.root / link.name}",
                "A sweep did not make this folder: move it away.",
            )
        link.symlink_to(target)


def state_of(point: Point, last_stage: str) -> State:
    """How far a point is, from what its own run and that of its inputs left behind."""
    paths = point.paths
    stages = read_status(paths.status_path).get("stages", {})
    states = {name: stage.get("state") for name, stage in stages.items()}
    if states.get(last_stage) == "finished":
        same = paths.config_path.is_file() and paths.config_path.read_text() == to_yaml(
            point.config
        )
        return State("done" if same else "waiting")
    if not stages:
        failed = read_status(point.inputs.paths.status_path).get("stages", {})
        errors = [f"{n}: {s.get('error')}" for n, s in failed.items() if s.get("state") == "failed"]
        return State("failed", errors[0]) if errors else State("waiting")
    for name, stage in stages.items():
        if stage.get("state") == "failed":
            return State("failed", f"{name}: {stage.get('error')}")
    if {"started", "running"} & set(states.values()):
        return State("running")
    return State("stopped" if "stopped" in states.values() else "waiting")
