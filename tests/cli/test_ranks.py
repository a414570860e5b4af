"""What is left of a failure on one rank: the verdict, and the logs."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from support.commands import dpo_dist, succeed
from support.ranks import started_ranks
from support.tiny_run import make_run

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import CheckpointError, DataError, disk_errors_as
from dpo_dist.run import attempts, pipeline
from dpo_dist.run.local_ranks import run_ranks
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status
from dpo_dist.run.topology import from_environment

ONE_WITHOUT_A_MODEL = (
    "test $RANK = 0 || set -- model.path=$0/nowhere; "
    "exec {python} -m dpo_dist reference $0/run.yaml $@"
)


@pytest.mark.fault(
    5,
    "a model that rank 1 alone does not see",
    becomes="the stage ends with the code and words of rank 1",
)
@pytest.mark.slow
def test_an_error_on_another_rank_alone_ends_the_stage_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that does not see the model: started again, it would not see it either."""
    succeed("prepare", make_run(tmp_path))
    monkeypatch.setattr("dpo_dist.run.local_ranks.GRACE_S", 1.0)
    paths = RunDir(tmp_path / "out")
    log_dir = attempts.begin(
        paths, "reference", RestartSection.model_validate({}), resubmitted=False
    )
    assert log_dir is not None
    program = ONE_WITHOUT_A_MODEL.format(python=sys.executable)
    assert run_ranks(["bash", "-c", program, str(tmp_path)], 2, log_dir) == 2
    assert read_status(paths.status_path)["stages"]["reference"]["state"] != "finished"
    outcome = attempts.judge(paths, "reference")
    assert (outcome.verdict, outcome.exit_code) == ("stop", 2)
    assert outcome.reason.startswith("rank 1: ") and "nowhere" in outcome.reason

    # the next attempt is judged by its own ranks
    attempts.begin(paths, "reference", RestartSection.model_validate({}), resubmitted=False)
    assert attempts.judge(paths, "reference").verdict == "restart"


def test_the_log_of_rank_0_has_its_error_and_the_terminal_has_it_once(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    done = dpo_dist("prepare", config, "data.train.0.path=nowhere.jsonl")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    paths = RunDir(tmp_path / "out")
    error = read_status(paths.status_path)["stages"]["prepare"]["error"]
    assert f"error: {error}" in (paths.log_dir("prepare", 1) / "rank0000.log").read_text()
    assert "nowhere.jsonl" in attempts.first_failure(paths.latest_log_link)


def fail_alone(config_path: str, reason: str) -> None:
    """A stage that fails on rank 1 while rank 0 waits, as it would in a collective of NCCL."""
    import torch.distributed as dist

    from dpo_dist.cli import rank
    from dpo_dist.engine.distributed import collectives

    # NCCL's waits for all ranks, for as long as a collective may take; gloo's does not
    dist.destroy_process_group = lambda *_: time.sleep(600)

    def stage(config: RunConfig) -> Path:
        topology = from_environment()
        with collectives.process_group(topology):
            if topology.rank == 1:
                raise DataError("found this", "that", "Do so.") if reason == "user" else OSError
            time.sleep(600)
        return config.run.dir

    rank._import_run = lambda _: stage  # pyright: ignore[reportPrivateUsage]
    rank._run_rank(pipeline.REFERENCE, load_config(Path(config_path)))  # pyright: ignore[reportPrivateUsage]


@pytest.mark.fault(
    34,
    "a failure on rank 1 while shutdown would wait for rank 0",
    becomes="reason on disk and on the terminal within seconds",
)
@pytest.mark.parametrize(
    ("reason", "code", "told", "verdict"),
    [
        ("user", 2, "error: found this; expected that. Do so.", ("stop", "rank 1: found this;")),
        ("crash", 1, "OSError", ("restart", "rank 1: OSError()")),
    ],
)
def test_truth_07_a_rank_that_fails_alone_tells_why_and_leaves(
    tmp_path: Path, reason: str, code: int, told: str, verdict: tuple[str, str]
) -> None:
    paths, config_path = RunDir(tmp_path / "out"), tmp_path / "run.yaml"
    config_path.write_text(
        f"{{run: {{dir: {paths.root}}}, model: {{path: m}}, data: {{train: [{{path: a}}]}}}}"
    )
    restart = RestartSection.model_validate({})
    attempts.begin(paths, "reference", restart, resubmitted=False)
    with started_ranks(2, fail_alone, str(config_path), reason) as ranks:
        waiting, failed = ranks.wait(timeout_s=45, grace_s=0.5)
    assert (failed.exit_code, waiting.exit_code) == (code, -signal.SIGKILL), "it waited for rank 0"
    assert told in failed.output
    outcome = attempts.judge(paths, "reference")
    assert (outcome.verdict, outcome.reason[: len(verdict[1])]) == verdict


def fail_of_disk(config_path: str, number: int) -> None:
    """A stage in which a read of rank 1 fails; rank 0 goes down with it."""
    from dpo_dist.cli import rank

    def stage(config: RunConfig) -> Path:
        if from_environment().rank == 0:
            time.sleep(600)
        with disk_errors_as(CheckpointError, "cannot read x", "a readable file", "Look there."):
            raise OSError(number, os.strerror(number))
        return config.run.dir

    rank._import_run = lambda _: stage  # pyright: ignore[reportPrivateUsage]
    rank._run_rank(pipeline.REFERENCE, load_config(Path(config_path)))  # pyright: ignore[reportPrivateUsage]


@pytest.mark.fault(36, "EIO on rank 1", becomes="exit 75, the stage is started again")
@pytest.mark.parametrize(
    ("number", "verdict", "code"), [(errno.EIO, "restart", 75), (errno.ENOSPC, "stop", 2)]
)
def test_truth_11_a_job_is_started_again_after_what_may_pass(
    tmp_path: Path, number: int, verdict: str, code: int
) -> None:
    paths, config_path = RunDir(tmp_path / "out"), tmp_path / "run.yaml"
    config_path.write_text(
        f"{{run: {{dir: {paths.root}}}, model: {{path: m}}, data: {{train: [{{path: a}}]}}}}"
    )
    attempts.begin(paths, "reference", RestartSection.model_validate({}), resubmitted=False)
    with started_ranks(2, fail_of_disk, str(config_path), number) as ranks:
        _, failed = ranks.wait(timeout_s=45, grace_s=0.5)
    outcome = attempts.judge(paths, "reference")
    assert (failed.exit_code, outcome.verdict, outcome.exit_code) == (code, verdict, code)
    assert os.strerror(number) in outcome.reason
