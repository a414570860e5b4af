import itertools
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.engine import checkpoint, collectives
from dpo_dist.engine.commit import commit, record_files
from dpo_dist.engine.shards import open_checkpoint
from dpo_dist.engine.train_state import TrainState
from dpo_dist.errors import CheckpointError
from dpo_dist.run_dir import COMMIT_NAME, MANIFEST_NAME
from dpo_dist.topology import from_environment
from tests.ranks import run_ranks
from tests.tiny_engine import case_name, checkpoints_of, full_weights, start_engine, train_step

CASES = list(itertools.product((0, 1, 2, 3), ("float32", "bfloat16"), (False, True)))
BIG_WIDTH = 1500  # the largest parameter of the memory test has 9 MB, the checkpoint 110 MB


def save_cases(folder: str, cases: list[tuple[int, str, bool]], width: int = 7) -> None:
    """Trains two steps and saves, for every case; rank 0 writes what the engine holds beside."""
    with collectives.process_group(from_environment()):
        for stage, dtype, adapter in cases:
            engine = start_engine(stage, adapter=adapter, dtype=dtype, width=width)
            for step in (1, 2):
                train_step(engine, step)
            run = checkpoints_of(folder, case_name(stage, dtype, adapter))
            state = TrainState(
                2, 12, 0.5, {}, torch.distributed.get_world_size(), stage
            )
            probe = np.arange(2), np.zeros((2, 2), dtype=np.float32)
            checkpoint.save(engine, run, state, *probe, keep=2)
            weights = full_weights(engine)
            if collectives.is_first():
                torch.save(weights, run.parent / "expected.pt")
            engine.destroy()


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n}ranks")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    run_ranks(request.param, save_cases, str(folder), CASES)
    return folder


@pytest.mark.parametrize("case", [case_name(*case) for case in CASES])
def test_reads_what_the_engine_holds(saved: Path, case: str) -> None:
    run = checkpoints_of(saved, case)
    weights, masters = torch.load(run.parent / "expected.pt")
    with open_checkpoint(run / "step-000002") as shards:
        assert set(shards.names_and_shapes) == set(weights)
        for name, weight in weights.items():
            assert name.startswith("policy.")
            assert shards.names_and_shapes[name] == weight.shape
            read = shards.read(name)
            assert read.dtype == torch.float32
            assert torch.equal(read.to(weight.dtype), weight), name
            if name in masters:
                assert torch.equal(read, masters[name]), name
        assert bool(masters) == ("stage0" not in case)
        if "full" in case:
            assert shards.aliases == {"policy.head.weight": "policy.embed.weight"}
            tied = shards.read("policy.head.weight")
            assert torch.equal(tied, shards.read("policy.embed.weight"))
        else:
            assert shards.aliases == {}
            assert all("adapter" in name for name in weights)
