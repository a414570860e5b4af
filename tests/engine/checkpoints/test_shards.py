import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from support.ranks import run_ranks
from support.tiny_engine import case_name, checkpoints_of, full_weights, start_engine, train_step

from dpo_dist.engine.checkpoints import saving
from dpo_dist.engine.checkpoints.commit import commit, record_files
from dpo_dist.engine.checkpoints.retention import prune
from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError
from dpo_dist.run.run_dir import COMMIT_NAME, MANIFEST_NAME, TRAIN_STATE_NAME
from dpo_dist.run.topology import from_environment

# (ZeRO stage, dtype, with adapter) by number of ranks; two ranks see every combination
CASES = {
    1: [(3, "float32", False), (3, "bfloat16", True), (1, "bfloat16", False)],
    2: [(s, d, a) for s in range(4) for d in ("float32", "bfloat16") for a in (False, True)],
    3: [(3, "float32", False), (3, "bfloat16", True), (2, "float32", False), (1, "bfloat16", True)],
}
BIG = {"width": 700, "depth": 8}  # parameters of 2 MB, 16 MB in all


def save_cases(folder: str, cases: list[tuple[int, str, bool]], big: bool) -> None:
    """Trains two steps and saves, for every case; rank 0 writes what the engine holds beside."""
    with collectives.process_group(from_environment()):
        for case in cases:
            save_case(checkpoints_of(folder, case_name(*case)), *case, {})
        if big:
            save_case(checkpoints_of(folder, "big"), 3, "float32", False, BIG)


def save_case(run: Path, stage: int, dtype: str, adapter: bool, size: dict[str, Any]) -> None:
    # Python 3.11.2 pickles a member of an enumeration in the first way, 3.11.7 in the second.
    ZeroStageEnum.__reduce_ex__ = (
        (lambda self, protocol: (getattr, (type(self), self.name)))
        if adapter
        else (lambda self, protocol: (type(self), (self.value,)))
    )  # pyright: ignore
    engine = start_engine(stage, adapter=adapter, dtype=dtype, **size)
    for step in (1, 2):
        train_step(engine, step)
    state = TrainState(2, 12, 0.5, {}, torch.distributed.get_world_size(), stage)
    probe = np.arange(2), np.zeros((2, 2), dtype=np.float32)
    saving.save(engine, run, state, *probe, keep=2)
    weights = full_weights(engine)
    if collectives.is_first():
        torch.save(weights, run.parent / "expected.pt")
    engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for world_size, cases in CASES.items():
        folders[world_size] = tmp_path_factory.mktemp(f"{world_size}ranks")
        run_ranks(world_size, save_cases, str(folders[world_size]), cases, world_size == 2)
    return folders


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(world_size, case_name(*case)) for world_size, cases in CASES.items() for case in cases],
)
def test_reads_what_the_engine_holds(saved: dict[int, Path], world_size: int, case: str) -> None:
    run = checkpoints_of(saved[world_size], case)
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


def test_frozen_weights_are_in_no_file(saved: dict[int, Path]) -> None:
    for case in ((s, "float32", True) for s in range(4)):
        step_dir = checkpoints_of(saved[2], case_name(*case)) / "step-000002"
        paths = list(step_dir.glob("*_model_states.pt"))
        assert paths, "no file of weights was looked at"
        for path in paths:
            names = set(torch.load(path, weights_only=True)["module"])
            assert {n for n in names if "adapter" not in n} == {"policy.shift"}, path


def test_stage3_cuts_into_several_sub_groups(saved: dict[int, Path]) -> None:
    """The layout that the other tests must have met, else they prove less than they say."""
    step_dir = checkpoints_of(saved[3], case_name(3, "float32", False)) / "step-000002"
    shard = torch.load(step_dir / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    flats = shard["optimizer_state_dict"]["fp32_flat_groups"]
    assert len(flats) >= 2
    with open_checkpoint(step_dir) as shards:
        sizes = [shape.numel() for shape in shards.names_and_shapes.values()]
    assert any(size % 3 for size in sizes), "no parameter whose last piece is padded"


def test_memory_stays_at_one_parameter(saved: dict[int, Path]) -> None:
    program = """
import re, sys
from pathlib import Path
from dpo_dist.engine.checkpoints.shard_reader import open_checkpoint
def resident_kib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
with open_checkpoint(Path(sys.argv[1])) as shards:
    shards.read("policy.scale")  # what torch sets up with the first tensor
    before, growth, largest, total = resident_kib(), 0, 0, 0
    for name in shards.names_and_shapes:
        weight = shards.read(name)
        growth = max(growth, resident_kib() - before)
        largest, total = max(largest, weight.nbytes // 1024), total + weight.nbytes // 1024
        del weight
    print(growth, largest, total)
"""
    step_dir = checkpoints_of(saved[2], "big") / "step-000002"
    output = subprocess.check_output([sys.executable, "-c", program, str(step_dir)], text=True)
    growth, largest, total = map(int, output.split())
    assert total > 8 * largest > 15_000
    assert growth < 1.5 * largest, f"{growth} KiB for a parameter of {largest} KiB"


def copy_of(saved: dict[int, Path], tmp_path: Path, case: tuple[int, str, bool]) -> Path:
    """A checkpoint to damage: hard links would damage the original too."""
    source = checkpoints_of(saved[2], case_name(*case)) / "step-000002"
    target = tmp_path / "checkpoints" / "step-000002"
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def recommit(step_dir: Path) -> None:
    """What a writer of other files would have committed."""
    (step_dir / MANIFEST_NAME).unlink()
    (step_dir / COMMIT_NAME).unlink()
    commit(step_dir, record_files(step_dir))


def test_flipped_bit_is_found_unless_verified_before(
    saved: dict[int, Path], tmp_path: Path
) -> None:
    step_dir = copy_of(saved, tmp_path, (3, "float32", False))
    shard = step_dir / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    found = "rank_1_mp_rank_00_optim_states.pt has another content than was committed"
    with pytest.raises(CheckpointError, match=found), open_checkpoint(step_dir):
        pass
    with open_checkpoint(step_dir, verified=True) as shards:
        assert len(shards.names_and_shapes) == 4


@pytest.mark.fault(29, "a pickle with code in it", becomes="refused and not run")
def test_a_foreign_pickle_is_refused_and_not_run(saved: dict[int, Path], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    step_dir = copy_of(saved, tmp_path, (3, "float32", False))
    shard = step_dir / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Payload()}, shard)
    recommit(step_dir)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(step_dir):
        pass
    assert f"{shard} is not readable (Weights only load failed" in str(caught.value)
    assert "Use the version that wrote the checkpoint" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_layout_is_refused(saved: dict[int, Path], tmp_path: Path) -> None:
    step_dir = copy_of(saved, tmp_path, (3, "float32", False))
    shard = step_dir / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(shard, weights_only=False)
    flats = content["optimizer_state_dict"]["fp32_flat_groups"]
    flats[0] = torch.cat([flats[0], torch.zeros(2)])
    torch.save(content, shard)
    recommit(step_dir)
    found = r"rank_1.* has \d+ elements, not \d+; expected shards"
    with pytest.raises(CheckpointError, match=found), open_checkpoint(step_dir):
        pass


def test_a_shard_less_than_the_ranks_is_refused(saved: dict[int, Path], tmp_path: Path) -> None:
    step_dir = copy_of(saved, tmp_path, (2, "float32", False))
    (step_dir / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    recommit(step_dir)
    found = "zero_pp_rank_1.* is not in the checkpoint"
    with pytest.raises(CheckpointError, match=found), open_checkpoint(step_dir):
        pass


def pruned(checkpoints_dir: str) -> None:
    prune(Path(checkpoints_dir), keep=2)


@pytest.mark.fault(
    18,
    "the checkpoint pruned by another process while it is read",
    becomes="the reader ends with the right numbers",
)
def test_pruning_does_not_disturb_a_reader(saved: dict[int, Path], tmp_path: Path) -> None:
    step_dir = copy_of(saved, tmp_path, (3, "float32", False))
    for step in (4, 6):
        newer = step_dir.with_name(f"step-{step:06d}")
        newer.mkdir()
        (newer / TRAIN_STATE_NAME).write_text("{}")
        commit(newer, record_files(newer))
    with open_checkpoint(step_dir) as shards:
        before = shards.read("policy.middle.0.weight")
        run_ranks(1, pruned, str(step_dir.parent))
        assert not step_dir.exists()
        assert torch.equal(shards.read("policy.middle.0.weight"), before)
    assert sorted(p.name for p in step_dir.parent.iterdir()) == ["step-000004", "step-000006"]
