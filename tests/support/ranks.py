"""Real ranks on this machine: N processes of one thread each, as a launcher would start them.

    def worker(folder: str) -> float:                # a module-level function of a test file
        with collectives.process_group(from_environment()) as device:
            ...
            return loss                              # anything JSON can hold

    losses = run_ranks(2, worker, str(tmp_path))     # one value a rank, in rank order

The ranks are forked from one process that has imported what all of them need (5 to 8 s a rank
otherwise); each has an environment, a session and an output file of its own. A worker leaves by
`os._exit` once its value is written, since DeepSpeed may abort at exit.
"""

import contextlib
import functools
import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dpo_dist.run.local_ranks import die_with_parent
from dpo_dist.run.topology import VARIABLES, Topology

ROOT = Path(__file__).parents[2]
POLL_S = 0.02
FAILURE_GRACE_S = 5.0  # for the other ranks to report what they saw
# Not as a program: its file would then be imported a second time, under its own name.
SERVER = "import sys; from support.ranks import serve; serve(int(sys.argv[1]))"
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}
IMPORTED = ("deepspeed", "peft", "dpo_dist.stages.reference", "dpo_dist.stages.train")


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    exit_code: int  # negative: the signal that killed it
    output: str  # stdout and stderr
    value: Any  # what the worker returned, None when it did not


@dataclass(frozen=True)
class Ranks:
    """The started processes of a job, in rank order."""

    processes: list["ForkedProcess"]
    folder: Path

    def wait(self, timeout_s: float, grace_s: float | None = None) -> list[RankResult]:
        """How every rank ended; those that still run after `timeout_s` are killed first.

        With `grace_s` the others get only so long once a rank has failed.
        """
        deadline = time.monotonic() + timeout_s
        while None in [process.poll() for process in self.processes]:
            if grace_s is not None and any(process.returncode for process in self.processes):
                deadline, grace_s = min(deadline, time.monotonic() + grace_s), None
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        self.kill()
        return [self._result(rank, process) for rank, process in enumerate(self.processes)]

    def kill(self) -> None:
        """Ends every rank that still runs, together with the processes it started."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _result(self, rank: int, process: "ForkedProcess") -> RankResult:
        value_path = _value_path(self.folder, rank)
        value = json.loads(value_path.read_text()) if value_path.exists() else None
        output = _output_path(self.folder, rank).read_text(errors="replace")
        return RankResult(cast(int, process.returncode), output, value)


@dataclass
class ForkedProcess:
    """A rank, with what `subprocess.Popen` would offer."""

    pid: int
    returncode: int | None = None  # negative: the signal that killed it

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(POLL_S)


@contextlib.contextmanager
def started_ranks(world_size: int, worker: Callable[..., Any], *args: Any) -> Iterator[Ranks]:
    """Starts `worker(*args)` on `world_size` ranks; the arguments travel as JSON."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks([], Path(folder))
        try:
            for rank in range(world_size):
                topology = Topology(rank, world_size, rank, world_size, "127.0.0.1", port)
                ranks.processes.append(_start(topology, ranks.folder, worker, args))
            yield ranks
        finally:
            ranks.kill()


def run_ranks(
    world_size: int, worker: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """What `worker(*args)` returns on each of `world_size` ranks; fails when a rank does."""
    with started_ranks(world_size, worker, *args) as ranks:
        results = ranks.wait(timeout_s, grace_s=FAILURE_GRACE_S)
    failed = [
        f"rank {rank} ended with {result.exit_code}:\n{result.output[-4000:]}"
        for rank, result in enumerate(results)
        if result.exit_code
    ]
    assert not failed, "\n".join(failed)
    return [result.value for result in results]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Polls until the condition holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(POLL_S)


def _start(
    topology: Topology, folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]
) -> ForkedProcess:
    source, module = Path(cast(str, inspect.getsourcefile(worker))), worker.__module__
    inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    pid = _ask(
        {
            "folder": str(source.parents[module.count(".")]),
            "module": module,
            "function": worker.__name__,
            "args": args,
            "value_path": str(_value_path(folder, topology.rank)),
            "output_path": str(_output_path(folder, topology.rank)),
            "environment": inherited | topology.environment() | SETTINGS,
        }
    )
    return ForkedProcess(cast(int, pid))


@functools.cache
def _server() -> tuple[subprocess.Popen[bytes], Any]:
    """The process that forks the ranks, and the stream to it; it dies with this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, str(theirs.fileno())],
            env=os.environ | SETTINGS | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return process, ours.makefile("rw")


def _ask(request: dict[str, Any]) -> int | None:
    _, stream = _server()
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    return json.loads(stream.readline())


def serve(descriptor: int) -> None:
    """Forks a rank, or tells how one ended, for each line from the socket `descriptor`."""
    for name in IMPORTED:
        importlib.import_module(name)
    stream = socket.socket(fileno=descriptor).makefile("rw")
    for line in stream:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become_a_rank(request)
        stream.write(json.dumps(answer) + "\n")
        stream.flush()


def _become_a_rank(call: dict[str, Any]) -> None:
    code = 1
    try:
        os.setsid()  # a process group of its own, to be killed with its children
        die_with_parent()
        output = os.open(call["output_path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.clear()
        os.environ.update(call["environment"])
        warnings.filterwarnings("error", module="dpo_dist")  # as pyproject.toml has it
        code = _run_worker(call)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _output_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _value_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _run_worker(call: dict[str, Any]) -> int:
    try:
        sys.path.insert(0, call["folder"])
        worker = getattr(importlib.import_module(call["module"]), call["function"])
        value = worker(*call["args"])
        Path(call["value_path"]).write_text(json.dumps(value))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
