from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.config.keys import explain_keys, to_yaml
from dpo_dist.config.run_config import RunConfig, load_config, parse_config
from dpo_dist.errors import ConfigError

MINIMAL = {
    "run": {"dir": "runs/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
}


def write(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def error_of(value: object, tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, value), overrides)
    return str(caught.value)


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    for section in ({"adapter": {"rank": 8}}, {"train": {"warmup_steps": 5}}):
        config = parse_config(MINIMAL | section)
        assert load_config(write(tmp_path, to_yaml(config))) == config


def test_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "train.learning_rate=1e-6", "adapter.rank=4", "data.train.0.limit=7",
            "data.max_length=512", "run.dir=runs/a b", "adapter.modules_to_save=[lm_head]",
        ],
    )  # fmt: skip
    assert config.train.learning_rate == 1e-6
    assert config.adapter is not None and config.adapter.rank == 4
    assert config.adapter.modules_to_save == ["lm_head"]
    assert config.data.train[0].limit == 7
    assert config.data.max_length == 512
    assert config.run.dir == Path("runs/a b")
    assert load_config(write(tmp_path, MINIMAL), ["adapter.rank=4", "adapter="]).adapter is None


@pytest.mark.fault(28, "unknown keys, wrong types", becomes="all are named at once")
def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    bad = {
        "model": {"path": "m", "dtyp": "bfloat16"},
        "data": {"train": [{"path": "a", "fromat": "orca"}], "on_empty": "ignore"},
        "objective": {"beta": -1},
        "trian": {},
    }
    assert error_of(bad, tmp_path) == (
        f"{tmp_path}/run.yaml has 6 problems:\n"
        "  run: missing; this key is required\n"
        "  model.dtyp: unknown key; did you mean dtype?\n"
        "  data.train.0.fromat: unknown key; did you mean format?\n"
        "  data.on_empty: 'ignore'; expected 'drop', 'raise' or 'keep'\n"
        "  objective.beta: -1; expected a number greater than 0\n"
        "  trian: unknown key; did you mean train?\n"
        "expected keys and values that `dpo-dist config` lists. Fix the lines above."
    )


@pytest.mark.fault(28, "a value of the wrong type", becomes="refused")
@pytest.mark.parametrize(
    ("section", "value", "line"),
    [
        ("train", {"learning_rate": "x"}, "train.learning_rate: 'x'; expected a valid number"),
        ("train", {"warmup_ratio": 2},
         "train.warmup_ratio: 2; expected a number less than or equal to 1"),
        ("ray", {"placement": "NEAR"},
         "ray.placement: 'NEAR'; expected 'PACK', 'SPREAD', 'STRICT_PACK' or 'STRICT_SPREAD'"),
        ("data", {"train": []},
         "data.train: []; list should have at least 1 item after validation, not 0"),
        ("reference", {"part": "2"},
         r"reference.part: '2'; string should match pattern '^[1-9]\d*/[1-9]\d*$'"),
    ],
)  # fmt: skip
def test_a_value_that_a_key_cannot_have(
    tmp_path: Path, section: str, value: dict[str, Any], line: str
) -> None:
    assert error_of(MINIMAL | {section: value}, tmp_path).splitlines()[1] == f"  {line}"


def test_unknown_key_without_a_near_name_lists_the_valid_ones(tmp_path: Path) -> None:
    message = error_of(MINIMAL | {"logging": {"zzz": 1}}, tmp_path)
    assert "logging.zzz: unknown key; valid: every_steps, tensorboard" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train",
            "override 'train'; expected section.key=value. For example, train.learning_rate=1e-6.",
        ),
        (
            "data.train.3.limit=1",
            "override 'data.train.3.limit=1': '3' is not an index into a list of 1; expected an "
            "index from 0 to 0. For example, data.train.0.limit=100.",
        ),
        (
            "data.eval.0.limit=1",
            "override 'data.eval.0.limit=1' names an entry of an empty list; expected a list with "
            "entries. Override the whole list.",
        ),
        (
            "run.dir.x=1",
            "override 'run.dir.x=1' goes inside run.dir, which is 'runs/x'; expected a section. "
            "Override run.dir itself.",
        ),
        (
            "run.dir=[x",
            "override 'run.dir=[x' is not YAML (while parsing a flow sequence in \"<unicode "
            "string>\", line 1, column 1: [x ^ expected ',' or ']', but got '<stream end>' in "
            '"<unicode string>", line 1, column 3: [x ^); expected section.key=value with a YAML '
            "value. Quote text that is not YAML: \"run.dir='[x'\".",
        ),
        (
            "run.dir=2026-13-01",
            "override 'run.dir=2026-13-01' is not YAML (month must be in 1..12); expected "
            "section.key=value with a YAML value. Quote text that is not YAML: \"run.dir='[x'\".",
        ),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    raw = MINIMAL | {"data": {"train": [{"path": "pairs.jsonl"}], "eval": []}}
    assert error_of(raw, tmp_path, override) == message


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/none.yaml: No such file or directory; expected a readable YAML run config. "
        "Start from one in examples/."
    )
    assert error_of("- 1", tmp_path) == (
        f"{tmp_path}/run.yaml holds a list; expected a YAML mapping of sections. Start from one in "
        "examples/."
    )
    message = error_of("a: [", tmp_path)
    assert message.startswith(f"{tmp_path}/run.yaml is not YAML (while parsing a flow node")
    assert message.endswith("); expected a YAML mapping of sections. Fix its syntax.")


def test_config_is_frozen() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.learning_rate = 1.0  # pyright: ignore


def test_problems_of_a_slurm_section() -> None:
    slurm = {"time": 43200, "stages": {"train": {"node": 3}, "trane": {"nodes": 1}}}
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | {"slurm": slurm})
    assert str(caught.value).splitlines()[1:4] == [
        "  slurm.time: 43200, which is how YAML reads an unquoted 12:00:00; expected text. Quote "
        "it.",
        "  slurm.stages.train.node: unknown key; did you mean nodes?",
        "  slurm.stages.trane.[key]: 'trane'; expected 'doctor', 'prepare', 'reference', "
        "'train', 'export', 'verify' or 'push'",
    ]


def test_every_key_is_explained() -> None:
    for key, kind, _, description in explain_keys():
        assert kind and description.endswith("."), key


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_parse(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


def test_the_examples_are_all_there() -> None:
    names = {path.stem for path in Path("examples").glob("*.yaml")}
    assert names == {
        "quickstart", "single_gpu_lora", "single_gpu_full", "full_zero3", "lora_zero3",
        "agent_trajectories",
    }  # fmt: skip


def keys_table() -> str:
    """The table of docs/config.md."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, kind, default, description in explain_keys():
        kind = kind.replace(" | ", ", ")
        shown = f"`{default}`" if default not in ("", "required") else default
        rows.append(f"| `{key}` | {kind} | {shown} | {description} |")
    return "\n".join(rows) + "\n"


def test_the_doc_explains_every_key_as_it_is() -> None:
    assert Path("docs/config.md").read_text().endswith("## Keys\n\n" + keys_table())
