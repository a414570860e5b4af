"""What a run has written, damaged or changed: as it was, or refused by the name of its file."""

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import changed_json, damaged, outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.engine.checkpoints.commit import commit, record_files, verify
from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint
from dpo_dist.engine.checkpoints.train_state import TrainState, check_resume, read_train_state
from dpo_dist.engine.weights.safetensors_reader import read_places, read_tensor
from dpo_dist.metrics.curves import PLOTS, displacement, points
from dpo_dist.metrics.writer import MetricsWriter, read_lines
from dpo_dist.model_files.files import position_limit, vocab_size_of, weight_files
from dpo_dist.reference.parts import ROW_DTYPE, part_paths, publish_part, read_part
from dpo_dist.reference.store import ScoringContract, explain_miss, list_contracts, open_store
from dpo_dist.run import attempts
from dpo_dist.run.exports import ExportDetails
from dpo_dist.run.manifest import FileRecord, Manifest, is_current, read_manifest
from dpo_dist.run.run_dir import (
    COMMIT_NAME,
    MANIFEST_NAME,
    TRAIN_STATE_NAME,
    RunDir,
    rank_failure_path,
)
from dpo_dist.run.status import describe_status, is_overdue, last_word, read_status

DETAILS = {"step": 3, "files": {"a": asdict(FileRecord(1, "0" * 64))}}
MANIFEST = Manifest("export", {"beta": 0.1, "model": {"path": "m"}}, {"pairs": "0" * 64}, DETAILS)
STATE = TrainState(
    2, 12, 0.5, {"train.seed": "1"}, 1, 0, [{"step": 2, "eval_loss": 0.5}], [1], {"torch": "2"}
)
STATUS = {
    "time": 1.0, "host": "n1", "pid": 7, "stage": "train", "state": "failed", "progress": 3,
    "train": {
        "step": 10, "num_steps": 40, "seconds_per_step": 120.0, "loss": 0.5,
        "rewards/margins": 1.25, "rewards/accuracies": 0.75, "pairs_per_second": 3.0,
    },
    "reference": {"num_scored": 12, "num_missing": 20, "pairs_per_second": 4.0},
    "restarts": {"total": 2, "without_progress": 0, "progress": 3},
    "stages": {"train": {"state": "running", "error": "boom", "exit_code": 1}},
    "best_checkpoint": "step-000010", "best_by": "eval_loss", "best_metric": 0.5,
    "skipped_steps": [3], "late": [{"rank": 3, "host": "n7", "section": "step"}],
}  # fmt: skip
FAILURE = {"error": "boom", "exit_code": 1, "restartable": True, "signal": 9}
CONTRACT = ScoringContract("0" * 64, "1" * 64, "float32", "packed", "completion")
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"w": "model.safetensors"}}
CONFIG = {
    "vocab_size": 7, "max_position_embeddings": 8, "text_config": {"vocab_size": 9},
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@given(changed_json(asdict(MANIFEST)))
def test_a_manifest(folder: Path, content: bytes) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(content)
    found = outcome("manifest", lambda: read_manifest(folder, ExportDetails), str(path))
    if found is not None:
        assert type(found.stage) is str and {*map(type, found.inputs.values())} <= {str}
        outcome(
            "manifest", lambda: is_current(folder, "export", MANIFEST.settings, MANIFEST.inputs),
            str(folder),
        )  # fmt: skip


@given(changed_json(asdict(STATE)))
def test_a_train_state(folder: Path, content: bytes) -> None:
    (folder / TRAIN_STATE_NAME).write_bytes(content)
    state = outcome("state", lambda: read_train_state(folder), str(folder / TRAIN_STATE_NAME))
    if state is not None:
        assert type(state.step) is int and type(state.world_size) is int
        outcome("state", lambda: check_resume(folder, state, STATE.digests), str(folder))


@given(changed_json(STATUS), changed_json({"section": "step", "limit": 90}), changed_json(FAILURE))
def test_the_state_of_a_run(folder: Path, status: bytes, heartbeat: bytes, failure: bytes) -> None:
    """A launcher goes on whatever it finds: nobody would start it again."""
    paths = RunDir(folder / "run")
    paths.log_dir("train", 1).mkdir(parents=True, exist_ok=True)
    paths.status_path.write_bytes(status)
    paths.heartbeat_path.write_bytes(heartbeat)
    rank_failure_path(paths.log_dir("train", 1), 1).write_bytes(failure)
    found, (age, limit) = read_status(paths.status_path), last_word(
        paths.status_path, paths.heartbeat_path
    )  # fmt: skip
    if found:
        describe_status(found, age, limit)
        is_overdue(found, age, limit)
    judged = outcome("status", lambda: attempts.judge(paths, "train"), str(paths.root))
    assert judged is not None and judged.verdict in ("next", "restart", "stop")
    attempts.note_end(paths, "train")
    attempts.worth_another(paths, "train", 75)
    caps = RestartSection(max_restarts=10**30, max_without_progress=10**30)
    outcome("status", lambda: attempts.begin(paths, "train", caps, resubmitted=True), "train")
    for log_dir in (path for path in paths.logs_dir.glob("train-*") if path.name != "train-01"):
        log_dir.rmdir()


@given(
    st.lists(changed_json({"step": 2, "time": 1.5, "loss": 0.5, "logps/chosen": -3.0}), max_size=4)
)
def test_metrics(folder: Path, lines: list[bytes]) -> None:
    path = folder / "metrics.jsonl"
    good = b'{"step": 1, "time": 1.0, "loss": 0.7}'
    path.write_bytes(b"\n".join([good, *(line.replace(b"\n", b"") for line in lines)]) + b"\n")
    found = outcome("metrics", lambda: read_lines(path), str(path))
    assert found and found[0] == json.loads(good)
    assert all(type(line["step"]) is int and line["step"] >= 0 for line in found)
    for plot in PLOTS:
        for name in plot.metrics:
            steps, values = points(found, name)
            assert len(steps) == len(values) and all(type(v) is float for v in values)
    displacement(found)
    with MetricsWriter(path, None, resume_step=1):
        pass
    assert read_lines(path)[0] == json.loads(good)


@functools.cache
def part() -> tuple[np.ndarray, bytes]:
    """The rows of a part, and its file."""
    rows = np.zeros(3, dtype=ROW_DTYPE)
    rows["key"] = [bytes([number]) * 16 for number in (1, 2, 3)]
    rows["logps"] = [[-1.0, -2.0]] * 3
    with tempfile.TemporaryDirectory() as scratch:
        publish_part(Path(scratch), rows, CONTRACT.digest())
        (path,) = part_paths(Path(scratch))
        return rows, path.read_bytes()


@given(st.data())
def test_a_part_of_the_reference_store(folder: Path, data: st.DataObject) -> None:
    store = folder / "store" / CONTRACT.digest()[:16]
    store.mkdir(parents=True, exist_ok=True)
    rows, content = part()
    changed = data.draw(st.just(content) | damaged(content))
    path = store / "part-000000.rows"
    path.write_bytes(changed)
    contract = data.draw(changed_json(asdict(CONTRACT)))
    (store / "contract.json").write_bytes(contract)
    list_contracts(store.parent)
    explain_miss(store.parent, ScoringContract("2" * 64, "1" * 64, "float32", "packed", "c"))
    found = outcome("part", lambda: read_part(path, CONTRACT.digest()), str(path))
    assert (found is None) == (changed != content)
    assert found is None or found.tobytes() == rows.tobytes()
    opened = outcome("store", lambda: open_store(store.parent, CONTRACT), str(store))
    assert opened is not None and opened.num_rows == (3 if changed == content else 0)


def made_checkpoint(folder: Path) -> Path:
    """A committed checkpoint of stage 0, as the reader knows it."""
    step_dir = folder / "step-000002"
    if not step_dir.exists():
        step_dir.mkdir()
        module = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
        states = {"module": module, "buffer_names": [], "param_shapes": [], "shared_params": {}}
        torch.save(states, step_dir / "mp_rank_00_model_states.pt")
        (step_dir / TRAIN_STATE_NAME).write_text(STATE.to_json())
        commit(step_dir, record_files(step_dir))
    return step_dir


@contextlib.contextmanager
def changed_file(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def weights_of(step_dir: Path, verified: bool) -> dict[str, Any]:
    with open_checkpoint(step_dir, verified=verified) as shards:
        return {name: shards.read(name).tolist() for name in shards.names_and_shapes}


@given(st.data())
def test_a_committed_checkpoint(folder: Path, data: st.DataObject) -> None:
    step_dir = made_checkpoint(folder)
    whole = weights_of(step_dir, verified=False)
    names = ("mp_rank_00_model_states.pt", TRAIN_STATE_NAME, MANIFEST_NAME, COMMIT_NAME)
    path = step_dir / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    changed = data.draw(
        damaged(content) if path.suffix == ".pt" else changed_json(json.loads(content))
    )
    with changed_file(path, changed):
        verified = outcome("checkpoint", lambda: verify(step_dir), str(step_dir))
        assert verified is None or changed == content or path.name == COMMIT_NAME
        found = outcome("checkpoint", lambda: weights_of(step_dir, False), str(step_dir))
        assert found in (None, whole)


@given(st.data())
def test_a_manifest_that_its_marker_names(folder: Path, data: st.DataObject) -> None:
    """As somebody else may have made it: it names no file outside, and any other harm is told."""
    step_dir = made_checkpoint(folder)
    manifest = step_dir / MANIFEST_NAME
    content = data.draw(changed_json(json.loads(manifest.read_text())))
    marker = json.dumps({"manifest": hashlib.sha256(content).hexdigest()}).encode()
    with changed_file(manifest, content), changed_file(step_dir / COMMIT_NAME, marker):
        outcome("checkpoint", lambda: verify(step_dir), str(step_dir))


@given(st.data())
def test_a_shard_that_was_damaged_after_it_was_verified(folder: Path, data: st.DataObject) -> None:
    step_dir = made_checkpoint(folder)
    path = step_dir / "mp_rank_00_model_states.pt"
    content = path.read_bytes()
    flipped = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with changed_file(path, bytes(flipped)):
        outcome("shard", lambda: weights_of(step_dir, True), str(step_dir))


@functools.cache
def safetensors_file() -> tuple[bytes, bytes]:
    """(header, data) of a file of two tensors."""
    data = np.arange(6, dtype="<f4").tobytes() + np.ones(2, dtype="<f4").tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    }
    return json.dumps(header).encode(), data


@given(st.data())
def test_the_header_of_a_safetensors_file(folder: Path, data: st.DataObject) -> None:
    header, numbers = safetensors_file()
    path = folder / "model.safetensors"
    changed = data.draw(changed_json(json.loads(header)))
    length = data.draw(st.just(len(changed)) | st.integers(0, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + changed + numbers)
    places = outcome("header", lambda: read_places([path]), str(path))
    for place in (places or {}).values():
        tensor = outcome("tensor", lambda place=place: read_tensor(place), str(path))
        assert tensor is not None and tuple(tensor.shape) == place.spec.shape


@given(changed_json(INDEX), changed_json(CONFIG))
def test_a_model_folder(folder: Path, index: bytes, config: bytes) -> None:
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        save_file({"w": torch.ones(1)}, model / "model.safetensors")
    (model / "model.safetensors.index.json").write_bytes(index)
    (model / "config.json").write_bytes(config)
    files = outcome("index", lambda: weight_files(model), str(model))
    assert files is None or all(path.parent == model for path in files)
    size = outcome("config.json", lambda: vocab_size_of(model), str(model))
    assert size is None or size > 0
    limit = outcome("config.json", lambda: position_limit(model), str(model))
    assert limit is None or limit > 0
