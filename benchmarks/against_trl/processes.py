"""Each measurement in processes of its own, forked from one that has imported what all need.

So its peak of memory is its own, and a second of imports is not paid a hundred times. The parent
only imports: a library that has started threads would not survive the fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dpo_dist.run.topology import Topology

FORK = multiprocessing.get_context("fork")
LAST = 3000  # characters of what a failed rank has said


def run(ranks: int, work: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
    """What `work(*args)` returns on each rank, in order; RuntimeError when one fails."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            topology = Topology(rank, ranks, rank, ranks, "127.0.0.1", port)
            receiver, sender = FORK.Pipe(duplex=False)
            log = Path(folder) / f"rank{rank}.log"
            child = FORK.Process(target=_child, args=(topology, sender, log, work, args))
            child.start()
            sender.close()
            started.append((child, receiver, log))
        results = []
        for child, receiver, log in started:
            try:
                results.append(json.loads(receiver.recv()))
            except EOFError:
                for other, *_ in started:
                    other.kill()
                raise RuntimeError(f"{args} failed:\n{log.read_text()[-LAST:]}") from None
            child.join()
        return results


def one(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """As `run`, in one process."""
    return run(1, work, *args)[0]


def _child(
    topology: Topology,
    sender: Connection,
    log: Path,
    work: Callable[..., dict[str, Any]],
    args: tuple[Any, ...],
) -> None:
    import torch

    with log.open("w") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    os.environ.update(topology.environment())
    torch.set_num_threads(max(1, torch.get_num_threads() // topology.world_size))
    code = 1
    try:
        sender.send(json.dumps(work(*args)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sender.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # DeepSpeed may abort at exit, after all its work


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
