"""Resumes on another number of ranks, through DeepSpeed's own converter."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.engine import checkpoint, collectives, universal
from dpo_dist.engine.commit import commit, record_files, verify
from dpo_dist.engine.train_state import TrainState, read_train_state
from dpo_dist.errors import CheckpointError
from dpo_dist.run_dir import MANIFEST_NAME, TRAIN_STATE_NAME
from dpo_dist.topology import from_environment
from tests.ranks import run_ranks
from tests.tiny_engine import case_name, checkpoints_of, start_engine, train_step

# (ZeRO stage, dtype, with adapter)
CASES = [
    (s, d, a) for s in (3,2,1,0) for a in (False, True) for d in ("float32", "bfloat16")
]


def next_losses(engine: Any) -> list[float]:
    return [train_step(engine, step) for step in (3, 4, 5)]


def saved_by_two(folder: str, cases: list[tuple[int, str, bool]]) -> dict[str, list[float]]:
    """Trains two steps, saves, goes on."""
    losses = {}
    with collectives.process_group(from_environment()):
        for case in cases:
            stage, dtype, adapter = case
            engine = start_engine(stage, adapter=adapter, dtype=dtype)
            for step in (1, 2):
                train_step(engine, step)
            state = TrainState(2, 12, 0.5, {}, 2, stage)
            probe = np.arange(1), np.zeros((1, 2), dtype=np.float32)
            checkpoint.save(
                engine, checkpoints_of(folder, case_name(*case)), state, *probe, keep=2
            )
            losses[case_name(*case)] = next_losses(engine)
            engine.destroy()
    return losses


def resumed_by_others(folder: str, cases: list[tuple[int, str, bool]]) -> dict[str, list[float]]:
    losses = {}
    with collectives.process_group(from_environment()):
        for case in cases:
            stage, dtype, adapter = case
            step_dir = checkpoints_of(folder, case_name(*case)) / "step-000002"
            convert = checkpoint.needs_conversion(step_dir, torch.distributed.get_world_size())
            assert convert == (stage > 0)
            engine = start_engine(stage, adapter=adapter, dtype=dtype, universal=convert)
            try:
                checkpoint.load(engine, step_dir, {})
                losses[case_name(*case)] = next_losses(engine)
            except Exception as e:
                import traceback; traceback.print_exc()
                losses[case_name(*case)] = [repr(e)]
            engine.destroy()
    return losses

def test_x(tmp_path):
    first = run_ranks(2, saved_by_two, str(tmp_path), CASES)[0]
    for n in (1,3):
        got = run_ranks(n, resumed_by_others, str(tmp_path), CASES, timeout_s=600)
        for k in first: print(n, k, first[k], got[0].get(k), max(abs(a-b) for a,b in zip(first[k],got[0][k])) if not isinstance(got[0][k][0],str) else "")

