"""Checkpoints of real ranks: exact resumes, failing disks, killed ranks. Files: test_commit.py."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faults.limits import limited
from support.ranks import run_ranks, started_ranks
from support.tiny_engine import case_name, checkpoints_of, full_weights, start_engine, train_step

from dpo_dist.engine.checkpoints import checkpoint, saving
from dpo_dist.engine.checkpoints.commit import verify
from dpo_dist.engine.checkpoints.train_state import TrainState, read_train_state
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import CheckpointError
from dpo_dist.run.manifest import digest_of
from dpo_dist.run.run_dir import COMMIT_NAME, MANIFEST_NAME, PROBE_NAME, TRAIN_STATE_NAME
from dpo_dist.run.topology import from_environment

# (ZeRO stage, dtype, with adapter)
CASES = [
    (3, "float32", False),
    (3, "bfloat16", True),
    (2, "bfloat16", False),
    (1, "float32", True),
    (0, "bfloat16", False),
]
IDENTITY = {"objective.beta": "0.1", "pairs": "abc"}


def save_at(engine: Any, checkpoints_dir: Path, step: int, keep: int = 2) -> Path:
    state = TrainState(
        step=step,
        consumed_pairs=6 * step,
        epoch=step / 4,
        digests=IDENTITY,
        world_size=torch.distributed.get_world_size(),
        zero_stage=engine.zero_optimization_stage(),
    )
    logps = np.array([[-1.5, -2.5], [-3.5, -4.5]], dtype=np.float32) * step
    return saving.save(engine, checkpoints_dir, state, np.array([0, 7]), logps, keep=keep)


def what_follows(engine: Any) -> dict[str, Any]:
    """All that a resume must reproduce: random draws, losses and weights of steps 3 and 4."""
    draws = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    losses = [train_step(engine, step) for step in (3, 4)]
    weights, masters = full_weights(engine)
    digest = digest_of({n: w.double().tolist() for n, w in {**weights, **masters}.items()})
    rate = engine.optimizer.param_groups[0]["lr"]
    return {"draws": draws, "losses": losses, "weights": digest, "learning_rate": rate}


def unbroken(folder: str) -> dict[str, Any]:
    """Trains two steps, saves, goes on."""
    followed = {}
    with collectives.process_group(from_environment()):
        for case in CASES:
            stage, dtype, adapter = case
            engine = start_engine(stage, adapter=adapter, dtype=dtype)
            for step in (1, 2):
                train_step(engine, step)
            random.seed(torch.distributed.get_rank())
            np.random.seed(torch.distributed.get_rank())
            torch.manual_seed(torch.distributed.get_rank())
            save_at(engine, checkpoints_of(folder, case_name(*case)), 2)
            followed[case_name(*case)] = what_follows(engine)
            engine.destroy()
    return followed


def refuse_other_runs(folder: Path, errors: list[str]) -> None:
    """Collects what every rank says to resumes that must not be."""
    run = checkpoints_of(folder, case_name(*CASES[1]))
    no_more_files = limited(resource.RLIMIT_NOFILE, 0)
    for resume in (run / "step-000009", run, run / ("x" * 300), "auto"):
        blind = resume == "auto" and not collectives.is_first()
        with (
            pytest.raises(CheckpointError) as caught,
            no_more_files if blind else contextlib.nullcontext(),
        ):
            checkpoint.choose_resume(run, resume)
        errors.append(str(caught.value))
    engine = start_engine(3, adapter=False, dtype="bfloat16")  # the checkpoint has an adapter
    for identity in (IDENTITY | {"objective.beta": "0.5"}, {}, IDENTITY):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(engine, run / "step-000002", identity)
        errors.append(str(caught.value))
    engine.destroy()


def resumed(folder: str) -> dict[str, Any]:
    """Starts afresh from what `unbroken` saved."""
    errors: list[str] = []
    followed: dict[str, Any] = {"errors": errors}
    with collectives.process_group(from_environment()):
        refuse_other_runs(Path(folder), errors)
        for case in CASES:
            stage, dtype, adapter = case
            engine = start_engine(stage, adapter=adapter, dtype=dtype)
            step_dir = checkpoint.choose_resume(checkpoints_of(folder, case_name(*case)), "auto")
            assert step_dir is not None
            state = checkpoint.load(engine, step_dir, IDENTITY)
            assert (state.step, state.consumed_pairs, state.epoch) == (2, 12, 0.5)
            followed[case_name(*case)] = what_follows(engine)
            engine.destroy()
    return followed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    first = run_ranks(2, unbroken, str(folder))
    return folder, first, run_ranks(2, resumed, str(folder))


@pytest.mark.parametrize("case", [case_name(*case) for case in CASES])
def test_resume_on_the_same_ranks_is_bit_exact(
    runs: tuple[Path, list[Any], list[Any]], case: str
) -> None:
    _, first, second = runs
    for rank in (0, 1):
        assert second[rank][case] == first[rank][case]
    assert first[0][case]["draws"] != first[1][case]["draws"]
    assert first[0][case]["losses"][0] != first[0][case]["losses"][1]


@pytest.mark.fault(
    11,
    "a rank that cannot open the checkpoint's files",
    becomes="the same error on every rank, naming it",
)
@pytest.mark.fault(
    17,
    "a path without a checkpoint, without a marker, of 300 characters",
    becomes="an error on every rank",
)
def test_what_is_no_checkpoint_is_an_error_on_every_rank(
    runs: tuple[Path, list[Any], list[Any]],
) -> None:
    folder, _, (first, second) = runs
    assert first["errors"] == second["errors"]
    run = checkpoints_of(folder, case_name(*CASES[1]))
    missing, unmarked, too_long, blind = first["errors"][:4]
    assert missing.startswith(f"{run}/step-000009 does not exist; expected a checkpoint as it was")
    assert unmarked.startswith(f"{run} has no COMMITTED marker; expected a checkpoint as it was")
    assert too_long == (
        f"cannot read {run / ('x' * 300)} (File name too long); expected a readable checkpoint. "
        "Check the path and its permissions."
    )
    assert blind.startswith(f"rank 1 cannot read {run}/step-000002/")
    assert blind.endswith(
        " (Too many open files); expected files that every rank can read. "
        "Check the file system and run.dir."
    )
    assert (run / "step-000002").exists()


@pytest.mark.fault(
    16,
    "another beta, other pairs, another model",
    becomes="refused on every rank with the difference",
)
def test_another_run_is_refused_on_every_rank(runs: tuple[Path, list[Any], list[Any]]) -> None:
    _, _, (first, second) = runs
    assert first["errors"] == second["errors"]
    setting, nothing, parameters = first["errors"][4:]
    assert setting.endswith(
        "step-000002 was trained with other settings or inputs "
        '(objective.beta: "0.1" -> "0.5"); expected those of this run config. '
        "Put them back to continue, or choose another run.dir to train anew."
    )
    assert '(objective.beta: "0.1" -> null; pairs: "abc" -> null)' in nothing
    assert parameters == (
        "the checkpoint and the model disagree about policy.embed.weight (8 parameters); expected "
        "the trainable parameters of this model. Resume with the model and adapter settings that "
        "wrote the checkpoint."
    )


def test_what_lies_in_a_checkpoint(runs: tuple[Path, list[Any], list[Any]]) -> None:
    run = checkpoints_of(runs[0], case_name(*CASES[0]))
    assert os.listdir(run) == ["step-000002"]  # no `latest`, no recovery script, no leftovers
    step_dir = run / "step-000002"
    assert sorted(path.name for path in step_dir.iterdir()) == [
        COMMIT_NAME, MANIFEST_NAME, PROBE_NAME, "rng_rank_00000.pt", "rng_rank_00001.pt",
        TRAIN_STATE_NAME,
        *(f"zero_pp_rank_{r}_mp_rank_00_{k}_states.pt" for r in (0, 1) for k in ("model", "optim")),
    ]  # fmt: skip
    assert set(verify(step_dir)) == set(os.listdir(step_dir)) - {COMMIT_NAME, MANIFEST_NAME}
    indices, logps = checkpoint.read_probe(step_dir)
    assert indices.tolist() == [0, 7]
    assert logps.dtype == np.float32 and logps.tolist() == [[-3, -5], [-7, -9]]
    versions = read_train_state(step_dir).versions
    assert torch.__version__.startswith(versions["torch"])
    assert {"python", "deepspeed", "transformers", "peft"} < set(versions)


# A disk that fails


def failing_disk(folder: str, small_disk: str | None) -> list[str]:
    """Saves while one rank's disk fails, then, if there is one, on a disk that fills up."""
    errors = []

    def failed_save(engine: Any, run: Path, step: int) -> None:
        with pytest.raises(CheckpointError) as caught:
            save_at(engine, run, step)
        errors.append(str(caught.value))
        if collectives.is_first():
            assert sorted(os.listdir(run)) == ["step-000001"]
            verify(run / "step-000001")
        collectives.barrier()

    with collectives.process_group(from_environment()):
        engine = start_engine(3, adapter=False)
        run = Path(folder) / "checkpoints"
        save_at(engine, run, 1)
        train_step(engine, 1)
        second = not collectives.is_first()
        with limited(resource.RLIMIT_FSIZE, 2000) if second else contextlib.nullcontext():
            failed_save(engine, run, 2)
        train_step(engine, 2)  # the ranks are still in step
        save_at(engine, run, 3)
        if small_disk:
            run = Path(small_disk) / "checkpoints"
            filler = Path(small_disk) / "filler"
            save_at(engine, run, 1)
            if collectives.is_first():
                free = shutil.disk_usage(small_disk).free
                filler.write_bytes(bytes(free - 12_000))
            failed_save(engine, run, 2)
            if collectives.is_first():
                filler.unlink()
                subprocess.check_call(["mount", "-o", "remount,ro", small_disk])
            collectives.barrier()
            failed_save(engine, run, 2)
            if collectives.is_first():
                subprocess.check_call(["mount", "-o", "remount,rw", small_disk])
            save_at(engine, run, 3)
    return errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str | None]:
    """A file system of 256 KiB, None where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    yield str(folder)
    subprocess.check_call(["umount", str(folder)])


@pytest.mark.fault(
    15,
    "a full tmpfs, a read-only one, a file limit on one rank, in a save",
    becomes="all ranks give the reason; what was committed stays",
)
def test_a_failed_write_stops_all_ranks_alike_and_keeps_what_stood(
    tmp_path: Path, small_disk: str | None
) -> None:
    first, second = run_ranks(2, failing_disk, str(tmp_path), small_disk)
    assert first == second
    run = tmp_path / "checkpoints"
    shard = run / ".step-000002.partial" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert first[0] == (
        f"{run}/.step-000002.partial could not be written (rank 1: {shard}: File too large); "
        "expected a writable folder with free space. Fix this and start again: training continues "
        "from the checkpoint before."
    )
    assert sorted(os.listdir(run)) == ["step-000001", "step-000003"]
    if small_disk is None:
        pytest.skip("a full and a read-only disk: this user may not mount a tmpfs")
    assert "No space left on device" in first[1]
    assert "could not be written (rank 0: Read-only file system)" in first[2]
    assert sorted(os.listdir(Path(small_disk) / "checkpoints")) == ["step-000001", "step-000003"]


# A rank that dies


def killed(folder: str, rank: int, function: str, call: int) -> None:
    """Saves steps 1 and 2, and is killed on one rank as it enters a function saving step 3."""
    with collectives.process_group(from_environment()):
        engine = start_engine(3, adapter=False)
        run = Path(folder) / "checkpoints"
        for step in (1, 2):
            train_step(engine, step)
            save_at(engine, run, step)
        calls = 0

        def kill_there(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            if event == "call" and frame.f_code.co_qualname == function:
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        if torch.distributed.get_rank() == rank:
            sys.setprofile(kill_there)
        save_at(engine, run, 3)


@pytest.mark.fault(
    2,
    "SIGKILL of rank 1 between two of its shards",
    becomes="the checkpoint before is taken, the partial one replaced; the other rank leaves",
)
@pytest.mark.fault(
    3,
    "SIGKILL between manifest and marker, before the rename, between commit and "
    "prune, while pruning",
    becomes="what was committed is taken, nothing is set aside",
)
@pytest.mark.parametrize(
    ("rank", "function", "call", "newest"),
    [
        pytest.param(1, "ShardWriter.save", 2, 2, id="between-shards"),
        pytest.param(
            0, "write_json", 2, 2, id="between-manifest-and-marker", marks=pytest.mark.slow
        ),
        pytest.param(0, "supersede", 1, 2, id="before-the-rename", marks=pytest.mark.slow),
        pytest.param(0, "prune", 1, 3, id="between-commit-and-prune", marks=pytest.mark.slow),
        pytest.param(0, "remove", 1, 3, id="while-pruning", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_loses_nothing_committed(
    tmp_path: Path, rank: int, function: str, call: int, newest: int
) -> None:
    with started_ranks(2, killed, str(tmp_path), rank, function, call) as ranks:
        results = ranks.wait(60)
    assert results[rank].exit_code == -signal.SIGKILL
    if newest == 2:  # the other rank waited for it and must not hang
        assert results[1 - rank].exit_code == 1, results[1 - rank].output
    run = tmp_path / "checkpoints"
    assert (run / ".step-000003.partial").exists() == (newest == 2)
    found = checkpoint.newest_committed(run)
    assert found == run / f"step-{newest:06d}"
    assert not (run / "quarantine").exists()
    (again,) = run_ranks(1, save_after, str(tmp_path))
    assert again == [f"step-{newest:06d}", "step-000004"]


def save_after(folder: str) -> list[str]:
    """The next save finds its way through what a killed one left."""
    run = Path(folder) / "checkpoints"
    with collectives.process_group(from_environment()):
        save_at(start_engine(3, adapter=False), run, 4)
    return sorted(os.listdir(run))


def going_back(folder: str) -> list[list[str]]:
    """Saves 2, 4, 6, 8 keeping two, then 5 as after a resume from an older step."""
    listings = []
    run = Path(folder) / "checkpoints"
    with collectives.process_group(from_environment()):
        engine = start_engine(0, adapter=False)
        for step in (2, 4, 6, 8, 7):
            save_at(engine, run, step)
            listings.append(sorted(os.listdir(run)))
    return listings


def test_saving_prunes_and_going_back_puts_the_abandoned_aside(tmp_path: Path) -> None:
    (listings,) = run_ranks(1, going_back, str(tmp_path))
    assert listings == [
        ["step-000002"],
        ["step-000002", "step-000004"],
        ["step-000004", "step-000006"],
        ["step-000006", "step-000008"],
        ["quarantine", "step-000006", "step-000007"],
    ]
    reason = tmp_path / "checkpoints" / "quarantine" / "step-000008.reason.txt"
    assert reason.read_text() == "training went back and reached step 7 again\n"
