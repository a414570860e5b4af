"""A file server that is gone for a moment ends no chain of jobs."""

import errno
import os
from pathlib import Path

import attempt
import command_line
import pytest

from dpo_dist.errors import EXIT_RESTART, ArtifactError
from dpo_dist.run import attempts
from dpo_dist.run.attempts import patiently


def flaky(failures: list[Exception]) -> str:
    if failures:
        raise failures.pop()
    return "there"


def gone(number: int = errno.EIO) -> OSError:
    return OSError(number, os.strerror(number), "status.json")


def test_what_passes_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[Exception] = [gone(), gone(errno.ESTALE)]
    assert patiently(lambda: flaky(failures), (0.0, 0.0)) == "there"
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"[Errno {number}] {os.strerror(number)}: 'status.json'; trying again in 0 s"
        for number in (errno.ESTALE, errno.EIO)
    ]


def test_what_does_not_pass_is_raised_at_once() -> None:
    for error in (gone(errno.EACCES), ArtifactError("a", "b", "c"), ValueError()):
        failures = [error]
        with pytest.raises(type(error)):
            patiently(lambda failures=failures: flaky(failures), (3600.0,))


def test_patience_ends() -> None:
    failures: list[Exception] = [gone()] * 3
    with pytest.raises(OSError, match="Input/output error"):
        patiently(lambda: flaky(failures), (0.0, 0.0))
    assert not failures


@pytest.mark.fault(
    36,
    "EIO while a launcher reads status.json",
    becomes="asked again; 75 when it stays",
)
@pytest.mark.parametrize("command", ["begin", "judge"])
def test_truth_11_a_chain_goes_on_after_its_file_server(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launch/attempt.py`, whose exit code ends a job: asked again, and 75 when nothing helps."""
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(
        f"run: {{dir: {tmp_path / 'out'}}}\nmodel: {{path: m}}\ndata: {{train: [{{path: a}}]}}\n"
        "train: {global_batch_size: 1, micro_batch_tokens: 8, learning_rate: 1.0}\n"
    )
    failures: list[Exception] = [gone()]
    real = attempts.read_status

    def reads(path: Path) -> object:
        flaky(failures)
        return real(path)

    monkeypatch.setattr(attempts, "read_status", reads)
    monkeypatch.setattr(attempts.time, "sleep", lambda _: None)
    monkeypatch.setattr("sys.argv", ["attempt.py", command, "train", str(run_yaml)])
    assert leaves() == 0 and not failures
    failures += [gone()] * 99
    assert leaves() == EXIT_RESTART


def leaves() -> object:
    with pytest.raises(SystemExit) as left:
        command_line.start(attempt.begin, attempt.judge)
    return left.value.code
