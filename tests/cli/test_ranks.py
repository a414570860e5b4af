"""What is left of a failure on one rank: the verdict, and the logs."""

import sys
from pathlib import Path

import pytest
from support.tiny_run import dpo_dist, make_run, succeed

from dpo_dist.config.cluster_section import RestartSection
from dpo_dist.run import attempts
from dpo_dist.run.local_ranks import run_ranks
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import read_status

ONE_WITHOUT_A_MODEL = (
    "test $RANK = 0 || set -- model.path=$0/nowhere; "
    "exec {python} -m dpo_dist reference $0/run.yaml $@"
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
