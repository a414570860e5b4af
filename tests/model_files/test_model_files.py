"""A model folder: its files, its identity, how long its pairs may be."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.errors import ModelFilesError
from dpo_dist.model_files import files as model_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_model(folder: Path, weights: dict[str, bytes], index: list[str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, content in weights.items():
        (folder / name).write_bytes(content)
    if index is not None:
        weight_map = {f"w{i}": name for i, name in enumerate(index)}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def error_of(call: object, *arguments: object) -> str:
    with pytest.raises(ModelFilesError) as caught:
        call(*arguments)  # pyright: ignore
    return str(caught.value)


def test_weight_files_single_and_sharded(tmp_path: Path) -> None:
    single = make_model(tmp_path / "a", {"model.safetensors": b"1"})
    assert [p.name for p in model_files.weight_files(single)] == ["model.safetensors"]
    sharded = make_model(tmp_path / "b", {"y": b"1", "x": b"2"}, ["y", "x", "y"])
    assert [p.name for p in model_files.weight_files(sharded)] == ["x", "y"]


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "other", {"model.safetensors": b"1"})
    folder = make_model(tmp_path / "a", {}, ["../other/model.safetensors"])
    assert error_of(model_files.weight_files, folder) == (
        f"{folder}/model.safetensors.index.json names '../other/model.safetensors'; expected file "
        "names inside the model folder. Do not use this model: its index points elsewhere."
    )


@pytest.mark.fault(29, "weights as `.bin`", becomes="refused unless allowed")
def test_missing_and_pickled_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", {}, ["x.safetensors"])
    assert error_of(model_files.weight_files, folder) == (
        f"{folder} lacks x.safetensors; expected every file its index names. Download the model "
        "again."
    )
    folder = make_model(tmp_path / "b", {"pytorch_model.bin": b"1"})
    assert error_of(model_files.weight_files, folder) == (
        f"{folder} has pickled weights only (pytorch_model.bin); expected safetensors: loading a "
        "pickle runs the code in it. Convert it, or set model.allow_pickle_weights=true if you "
        "trust its author."
    )
    assert len(model_files.weight_files(folder, allow_pickle=True)) == 1
    folder = make_model(tmp_path / "c", {})
    assert error_of(model_files.weight_files, folder) == (
        f"{folder} has no weight files; expected model.safetensors. Download the model again."
    )


def test_digest_follows_the_content_not_the_path(tmp_path: Path) -> None:
    one = make_model(tmp_path / "a", {"model.safetensors": b"1"})
    same = make_model(tmp_path / "b", {"model.safetensors": b"1"})
    assert model_files.digest_of_weights(one) == model_files.digest_of_weights(same)
    (same / "model.safetensors").write_bytes(b"2")
    assert model_files.digest_of_weights(one) != model_files.digest_of_weights(same)


@pytest.mark.fault(
    21,
    "new weights under the same path, of the same size",
    becomes="another digest",
)
def test_new_weights_of_the_same_size_and_path_are_noticed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", {"model.safetensors": b"1"})
    before = model_files.digest_of_weights(folder)
    stat = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_bytes(b"2")
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert model_files.digest_of_weights(folder) != before


def test_resolve(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", {})
    assert model_files.resolve_model_dir(str(folder)) == folder
    assert error_of(model_files.resolve_model_dir, str(tmp_path)) == (
        f"{tmp_path} has no config.json; expected a Hugging Face model folder, or a hub id such as "
        "org/name. Correct model.path."
    )
    message = error_of(model_files.resolve_model_dir, "no/such-model")
    assert message.startswith("model 'no/such-model' is not a folder here, and the hub gave none")
    assert message.endswith(
        "Correct model.path, download it where there is a network, or set HF_TOKEN."
    )


def test_tokenizer_digest(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", {})
    assert "has no tokenizer files; expected tokenizer.json" in error_of(
        model_files.digest_of_tokenizer, folder
    )
    (folder / "tokenizer.json").write_text("{}")
    before = model_files.digest_of_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("x")
    assert model_files.digest_of_tokenizer(folder) != before


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                },
            },
            512,
        ),
        (  # Llama 3.1
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            512,
        ),
        ({"text_config": {"n_positions": 77}}, 77),
        ({}, None),
    ],
)  # fmt: skip
def test_lengths_reach_as_far_as_scaled_rotary_embeddings(
    tmp_path: Path, changes: dict[str, Any], limit: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changes))
    assert model_files.position_limit(tmp_path) == limit
