"""Every refusal behind `prepare` is tried in front, or can't be known there: a closed list."""

import ast
from pathlib import Path

from test_preflight import CASES

import dpo_dist

PACKAGE = Path(dpo_dist.__file__).parent
BEHIND = ["engine", "training", "exporting", "verification", "inputs", "reference", "model_files"]
STAGES = ["reference", "train", "export", "verify", "push"]
CHECKPOINTS = "of files that training wrote: damaged, foreign, or of another run"
EXPORTS = "of files that export wrote: missing, changed, or not verified"
MACHINE = "of the machine that a rank runs on"
WEIGHTS = "of the weights as they are loaded, in the first minute of a stage"
TRAINED = "of what training computed"
COMMAND = "of what another command is asked for"
OWN_STAGE = "by `prepare` itself, which looks at the same first"

LATER = {
    "engine/checkpoints/checkpoint.py": CHECKPOINTS,
    "engine/checkpoints/commit.py": CHECKPOINTS,
    "engine/checkpoints/resharding.py": CHECKPOINTS,
    "engine/checkpoints/retention.py": CHECKPOINTS,
    "engine/checkpoints/saving.py": MACHINE,
    "engine/checkpoints/shard_loader.py": CHECKPOINTS,
    "engine/checkpoints/shard_reader.py": CHECKPOINTS,
    "engine/checkpoints/train_state.py": CHECKPOINTS,
    "engine/distributed/collectives.py": MACHINE,
    "engine/distributed/devices.py": MACHINE,
    "engine/export/own_base.py:_vocabulary_tensors": OWN_STAGE,
    "engine/export/weight_changes.py:_check_names": CHECKPOINTS,
    "engine/export/weight_streams.py:_finite": TRAINED,
    "engine/forward/attention.py": WEIGHTS,
    "engine/forward/backend_choice.py:choose_backend": MACHINE,
    "engine/forward/layout_choice.py": WEIGHTS,
    "engine/forward/pair_scorer.py:_use_attention": WEIGHTS,
    "engine/model/dropout.py:check_no_dropout": WEIGHTS,
    "engine/model/recompute.py": WEIGHTS,
    "engine/model/tiled_mlp.py": WEIGHTS,
    "engine/sharding/schedule.py:warmup_and_decay": OWN_STAGE,
    "engine/model/load.py:load_model": WEIGHTS,
    "engine/model/model_choice.py": COMMAND,
    "engine/sharding/ds_config.py:_check_kinds": OWN_STAGE,
    "engine/sharding/ds_config.py:_read_object": OWN_STAGE,
    "engine/sharding/optimizers.py": MACHINE,
    "engine/weights/safetensors_reader.py:_entry": WEIGHTS,
    "engine/weights/safetensors_reader.py:read_places": WEIGHTS,
    "engine/weights/safetensors_reader.py:read_tensor": WEIGHTS,
    "exporting/choice.py": CHECKPOINTS,
    "exporting/job.py:_check_trained_here": CHECKPOINTS,
    "exporting/weights.py:_progress": MACHINE,
    "inputs/work.py:_check_order": "of pairs that an earlier version prepared",
    "inputs/work.py:check_tokenizer": OWN_STAGE,
    "inputs/scored_pairs.py": "of the reference store, which the reference pass has filled",
    "model_files/adapter.py": OWN_STAGE,
    "model_files/files.py:_indexed": OWN_STAGE,
    "model_files/files.py:_refuse_adapter": OWN_STAGE,
    "model_files/files.py:digest_of_tokenizer": OWN_STAGE,
    "model_files/files.py:read_model_config": OWN_STAGE,
    "model_files/files.py:resolve_model_dir": OWN_STAGE,
    "model_files/hub.py:_explained": "of what the hub answers",
    "model_files/hub.py:push_folder": "of what the hub answers",
    "reference/parts.py": "of the reference store's own files",
    "reference/store.py": "of log-probs that were computed or are missing",
    "stages/push.py:_check_base_name": "of an export made elsewhere; _try_push is its twin",
    "stages/push.py:_verified_files": EXPORTS,
    "stages/push.py:run": COMMAND,
    "stages/reference.py:_refuse_bad": TRAINED,
    "stages/reference.py:status": COMMAND,
    "stages/verify.py": EXPORTS,
    "training/checkpointing.py:_check_finite": TRAINED,
    "training/gate.py:check_start": TRAINED,
    "training/records.py:_check_skipped": TRAINED,
    "verification/check.py:refuse": EXPORTS,
}


def refusals() -> set[str]:
    """FILE:FUNCTION of every error that is raised with a message."""
    files = [path for room in BEHIND for path in (PACKAGE / room).rglob("*.py")]
    files += [PACKAGE / "stages" / f"{stage}.py" for stage in STAGES]
    found: set[str] = set()
    for path in files:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and _refuses(function):
                found.add(f"{path.relative_to(PACKAGE)}:{function.name}")
    return found


def _refuses(function: ast.FunctionDef) -> bool:
    raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise)]
    names = [ast.unparse(exc.func) for exc in raised if isinstance(exc, ast.Call)]
    return any(name not in ("AssertionError", "Stopped") for name in names)


def test_every_refusal_is_tried_in_front_or_has_its_reason() -> None:
    found, front = refusals(), {*CASES, "exporting/preflight.py:_try_push"}
    assert front <= found, sorted(front - found)
    behind = found - front
    unexplained = {name for name in behind if not {name, name.partition(":")[0]} & LATER.keys()}
    assert not unexplained, f"no case in test_preflight.py, no reason here: {sorted(unexplained)}"
    used = {key for name in behind for key in (name, name.partition(":")[0]) if key in LATER}
    assert used == LATER.keys(), sorted(LATER.keys() - used)
