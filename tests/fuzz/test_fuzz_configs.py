"""Run configs, overrides and DeepSpeed JSONs: read, or refused by name."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import changed_json, damaged, outcome, texts, values
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.keys import override_names
from dpo_dist.config.run_config import load_config, parse_config
from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.sharding.ds_config import read_sharding, training_config, zero_stage

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
}
RECIPE = (Path(__file__).parents[2] / "examples" / "quickstart.yaml").read_bytes()
KEYS = sorted(name.removesuffix("=") for name in override_names())
NAMES = sorted({part for key in KEYS for part in key.split(".") if not part.isdigit()})
ZERO: dict[str, Any] = {
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "cpu"}, "compute_grad_norm": True,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def check(what: str, path: Path, content: bytes, *overrides: str) -> None:
    """The file is refused under its name, or is a config of numbers that reads back equal."""
    path.write_bytes(content)
    names = [str(path), *(repr(override) for override in overrides)]
    config = outcome(what, lambda: load_config(path, overrides), *names)
    if config is not None:
        assert parse_config(config.model_dump(mode="json")) == config
        assert not [n for n in numbers(config.model_dump(exclude=FREE)) if not math.isfinite(n)]


FREE = {"data": {"chat_template_kwargs"}}  # for a template to read


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


@given(damaged(RECIPE))
def test_a_damaged_yaml(folder: Path, content: bytes) -> None:
    check("YAML", folder / "run.yaml", content)


@given(texts() | st.text(st.sampled_from("[]{}:,&*!<|>-?%@ \n\t'\"#ab01.~"), max_size=30))
def test_any_text_as_yaml(folder: Path, text: str) -> None:
    check("YAML", folder / "run.yaml", text.encode(errors="surrogatepass"))


@given(st.sampled_from(KEYS), values(*NAMES))
def test_any_value_of_any_key(folder: Path, key: str, value: Any) -> None:
    raw: Any = copy.deepcopy(MINIMAL)
    target, (*parents, leaf) = raw, key.split(".")
    for part in parents:
        if isinstance(target, list):
            target += [{"path": "pairs.jsonl"}] * (not target)
            target = target[int(part)]
        else:
            target = target.setdefault(part, [] if (part, "data") == ("eval", parents[0]) else {})
    target[leaf] = value
    path = folder / "run.yaml"
    check("config", path, yaml.safe_dump(raw).encode(errors="surrogatepass"))


@given(values(*NAMES))
def test_any_value_as_config(raw: Any) -> None:
    if isinstance(raw, dict):
        outcome("config", lambda: parse_config(MINIMAL | raw, "the config"), "the config")


PARTS = st.sampled_from([*NAMES, "0", "1", "-1", "²", "9" * 5000, ""]) | texts()


@given(
    st.sampled_from(KEYS) | st.lists(PARTS, max_size=4).map(".".join),
    texts() | values().map(lambda v: json.dumps(v)) | st.sampled_from(NAMES),
    st.sampled_from(("=", "=", "=", "", "==")),
)
def test_any_override(folder: Path, key: str, value: str, sign: str) -> None:
    override = f"{key}{sign}{value}"
    check("override", folder / "run.yaml", yaml.safe_dump(MINIMAL).encode(), override)


@given(changed_json(ZERO), st.sampled_from(("bfloat16", "float32")))
def test_any_deepspeed_json(folder: Path, content: bytes, dtype: str) -> None:
    path = folder / "sharding.json"
    path.write_bytes(content)
    raw = outcome("DeepSpeed JSON", lambda: read_sharding(str(path)), str(path))
    if raw is not None:
        assert type(zero_stage(raw)) is int and zero_stage(raw) in range(4)
        train = TrainSection(deepspeed=str(path))  # pyright: ignore[reportCallIssue]
        training_config(train, dtype, 2)


@given(texts())
def test_any_name_of_a_sharding(name: str) -> None:
    outcome("DeepSpeed JSON", lambda: read_sharding(name), repr(name), f"{name} is not JSON")
