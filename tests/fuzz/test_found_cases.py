"""What fuzzing found, one case of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import nested

from dpo_dist.config.data_section import SourceSection
from dpo_dist.config.run_config import load_config, parse_config
from dpo_dist.data.rows.formats import read_pair
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.engine.sharding.ds_config import read_sharding
from dpo_dist.engine.weights.safetensors_reader import read_places
from dpo_dist.errors import ArtifactError, ConfigError, DataError, ModelFilesError
from dpo_dist.metrics.writer import read_lines
from dpo_dist.model_files.files import position_limit, weight_files
from dpo_dist.run import attempts
from dpo_dist.run.manifest import digest_of, read_manifest
from dpo_dist.run.run_dir import MANIFEST_NAME, RunDir, rank_failure_path
from dpo_dist.run.status import read_status, update_stage

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
}
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("run: 2024-13-45", "is not YAML (month must be in 1..12)"),
        ("run: !!bool x", "is not YAML ('x')"),
        ('run: !!int ""', "is not YAML (string index out of range)"),
        ("run: !!timestamp x", "is not YAML ('NoneType'"),
        (f"run: {'9' * 5000}", "is not YAML (Exceeds the limit"),
        (f"run: {nested(2000)}", "is not YAML (it is nested deeper than 100 levels)"),
        ("run: &a [*a]", "is not YAML (it is nested deeper than 100 levels)"),
        (LAUGHS, "is not YAML (its aliases stand for more than 1,000,000 entries)"),
    ],
    ids=["date", "bool", "int", "timestamp", "digits", "depth", "itself", "aliases"],
)
def test_what_is_no_yaml(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path} {found}")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.train.².limit=1", "'²' is not an index into a list of 1"),
        (f"data.train.{'9' * 5000}=1", "is not an index into a list of 1"),
        ("adapter.modules_to_save.0.x=1", "which is 'head'"),
        ("run.seed=!!bool x", "is not YAML"),
    ],
)
def test_overrides(tmp_path: Path, override: str, found: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(MINIMAL | {"adapter": {"modules_to_save": ["head"]}}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "found"),
    [
        ("train", "learning_rate", float("inf"), "inf; expected a finite number"),
        ("objective", "beta", float("inf"), "inf; expected a finite number"),
        ("eval", "every_steps", float("inf"), "inf; expected a number of steps"),
        ("run", "dir", "a\0b", "'a\\x00b' holds a zero byte; expected a path"),
        ("model", "path", "x" * 300, "is longer than a path can be"),
        ("model", "path", "~nobody-of-this-name/m", "'nobody-of-this-name', who is not a user"),
    ],
)
def test_values(section: str, key: str, value: Any, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | {section: MINIMAL.get(section, {}) | {key: value}})
    assert f"{section}.{key}: " in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1]", "holds [1]; expected a DeepSpeed JSON, an object"),
        ('{"zero_optimization": 3}', "sets zero_optimization to 3; expected an object"),
        ('{"zero_optimization": {"stage": "2"}}', "sets zero_optimization.stage to '2'"),
        ('{"zero_optimization": {"stage": 4}}', "sets zero_optimization.stage to 4"),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
            "sets zero_optimization.reduce_bucket_size to 'auto'; expected a number of at least 1",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": "cpu"}}',
            "sets zero_optimization.offload_param to 'cpu'; expected an object",
        ),
    ],
)
def test_deepspeed_jsons(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "sharding.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_sharding(str(path))
    assert str(caught.value).startswith(f"{path} {found}")


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", f"[{ROW}]\n[{ROW}]", ":2 is not JSON (Extra data, column 1)"),
        ("a.json", f'{{"data":\n[{ROW}], "x": 1', ":2 is not JSON (Expecting ',' or '}'"),
        ("a.json", f"[{nested(5000)}]", ":1 is not JSON (it is nested too deeply)"),
        ("a.json", f"[{ROW},\n{'9' * 5000}]", ":2 is not JSON (Exceeds the limit"),
        ("a.jsonl", f'{{"x": {nested(200)}}}', ":1 is not JSON (it is nested deeper than 100"),
        ("a.csv", "\0prompt,chosen,rejected\na,b,c\n", ":1 names a column '\\x00prompt'"),
    ],
)
def test_data_files(tmp_path: Path, name: str, content: str, found: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    section = SourceSection.model_validate({"path": str(path)})
    with pytest.raises(DataError) as caught:
        open_sources([section], "train", tmp_path)
    assert str(caught.value).startswith(f"{path}{found}")


def test_a_history_that_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "chosen": "b", "rejected": "c", "history": 5}')
    section = SourceSection.model_validate({"path": str(path)})
    (source,) = open_sources([section], "train", tmp_path)
    with pytest.raises(DataError, match="field 'history' is a number; expected a list of turns"):
        read_pair(next(iter(source.rows.read([0]))), source.row_format, "a")  # pyright: ignore


def test_half_a_character_has_an_identity() -> None:
    assert digest_of("\ud800") != digest_of("\ud801")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", "Input should be an object"),
        ('{"stage": "x", "settings": 5, "inputs": {}}', "settings: Input should be"),
        ('{"stage": "x", "settings": {}, "inputs": {}, "y": 1}', "y: unknown key"),
        (nested(5000), "it is nested deeper than 100 levels"),
    ],
)
def test_manifests(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / MANIFEST_NAME
    path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{path} is not readable ({found}")


@pytest.mark.parametrize("text", ["[]", '{"stages": []}', '{"time": 1, "host": "a"}', nested(5000)])
def test_a_status_that_was_not_written_here_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "status.json"
    path.write_text(text)
    assert read_status(path) == {}


@pytest.mark.parametrize("text", ["", '{"signal": ', "[]", '{"signal": "x"}'])
def test_a_note_of_a_rank_that_was_cut_short_ends_no_chain(tmp_path: Path, text: str) -> None:
    paths = RunDir(tmp_path)
    update_stage(paths.status_path, "train", "running")
    paths.log_dir("train", 1).mkdir(parents=True)
    note = rank_failure_path(paths.log_dir("train", 1), 3)
    note.write_text(text)
    outcome = attempts.judge(paths, "train")
    assert (outcome.verdict, outcome.reason) == ("restart", f"rank 3: {note} is not readable")


@pytest.mark.parametrize("line", ['{"step": Infinity}', '{"step": "2"}', nested(5000), "9" * 5000])
def test_a_line_that_is_no_metric_is_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    assert read_lines(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.9], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]},
    ],
)
def test_headers_of_safetensors(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ModelFilesError, match="has no readable header"):
        read_places([path])


def test_model_folders(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": 5}}')
    with pytest.raises(ModelFilesError, match=r"index.json is not readable \(weight_map.w: "):
        weight_files(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelFilesError, match=r"config.json is not readable \(it holds '\[\]'"):
        position_limit(tmp_path)
    rope = {"factor": "4", "original_max_position_embeddings": None}
    config = {"max_position_embeddings": 8, "rope_scaling": rope, "text_config": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert position_limit(tmp_path) == 8
