"""A look at the machines before the expensive stages: doctor.json, and the node to leave out.

1. Every rank writes what it sees into RUN/doctor: the run folder must be there and writable.
2. Rank 0 waits for all of these files and names the nodes that wrote none.
3. Rank 0 compares versions, GPUs, attention kernels and free disk, and tries what an export needs.
4. All ranks join a process group and time one all-reduce.
"""

import json
import logging
import os
import platform
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.cuda.nccl as nccl
from rich.table import Table

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.devices import device_of
from dpo_dist.engine.forward.backend_choice import BACKENDS, device_obstacle, import_obstacle
from dpo_dist.errors import ClusterError
from dpo_dist.exporting.preflight import preflight_here
from dpo_dist.inputs.disk import disk_sizes
from dpo_dist.inputs.setup import make_setup
from dpo_dist.inputs.work import prepared_work
from dpo_dist.planning.sizes import GIB, total
from dpo_dist.run.logs import console
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import POLL_S, Topology, from_environment, node_names

_logger = logging.getLogger(__name__)
PACKAGES = (
    "dpo-dist", "torch", "deepspeed", "transformers", "tokenizers", "peft", "datasets",
    "accelerate", "huggingface-hub", "numpy", "pyarrow", "pydantic", "safetensors", "tensorboard",
    "httpx2", "flash-attn", "bitsandbytes", "ray", "lm-eval", "wandb",
)  # fmt: skip
ARRIVAL_S = 120.0
REDUCED_MIB = 64
Facts = dict[str, Any]


def run(config: RunConfig) -> Path:
    """Looks at every node of the job; raises ClusterError naming what is wrong and where.

    Raises what `preflight` raises of a model that is here, and ConfigError for a number of ranks
    that train.sequence_parallel does not divide.
    """
    paths, topology = RunDir(config.run.dir), from_environment()
    topology.in_teams_of(config.train.sequence_parallel)
    started = time.time()
    own = _arrival_path(paths, topology.rank)
    try:
        write_json(own, look(paths.root, topology))
    except OSError as error:
        raise ClusterError(
            f"{socket.gethostname()} cannot write {own} ({error.strerror})",
            "a run folder that every node sees and may write to",
            "Put run.dir on a shared file system, or leave the node out "
            f"(--exclude={socket.gethostname()}).",
        ) from None
    if topology.rank == 0:
        facts = await_all(paths, topology, started)
        refuse_differences(facts)
        preflight_here(config)
        disk = check_disk(config, topology)
    with collectives.process_group(topology) as device:
        seconds = collectives.time_all_reduce(REDUCED_MIB, device)
    if topology.rank == 0:
        gib_per_s = REDUCED_MIB / 1024 / seconds
        report = {"ranks": facts, "all_reduce_gib_per_s": gib_per_s} | disk
        write_json(paths.doctor_path, report)
        _logger.info(
            "doctor: %d ranks on %s; all-reduce of %d MiB in %.1f ms (%.2f GiB/s)",
            topology.world_size, ", ".join(_hosts(facts)), REDUCED_MIB, seconds * 1e3, gib_per_s,
        )  # fmt: skip
    return paths.doctor_path


def look(folder: Path, topology: Topology) -> Facts:
    """What this process sees of its machine, and of GPUs its own only.

    Looking at another rank's would open a context on it, which exclusive mode forbids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = device_of(topology)
    gpus = []
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or the first one is opened first
        gpus = [torch.cuda.get_device_properties(device)]
    return {
        "host": socket.gethostname(),
        "address": collectives.own_address(topology.master_addr),
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "time": time.time(),
        "versions": {"python": platform.python_version()}
        | {p: _version(p) for p in PACKAGES}
        | _gpu_versions(),
        "gpus": [{"name": gpu.name, "gib": round(gpu.total_memory / GIB, 1)} for gpu in gpus],
        "num_gpus": torch.cuda.device_count(),
        "attention": _attention(device),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "free_disk_gib": round(shutil.disk_usage(folder).free / GIB, 1),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _attention(device: torch.device) -> dict[str, str]:
    """Whether each attention backend works on `device`, found by trying, and why not."""
    return {
        backend: import_obstacle(backend)
        or device_obstacle(backend, device, torch.bfloat16)
        or "works"
        for backend in BACKENDS
    }


def _gpu_versions() -> dict[str, str]:
    """What torch was built with; nodes that differ in NCCL do not understand each other."""
    found = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "none"
    return {"cuda": torch.version.cuda or "none", "nccl": found}


def _arrival_path(paths: RunDir, rank: int) -> Path:
    return paths.doctor_dir / f"rank{rank:04d}.json"


def await_all(paths: RunDir, topology: Topology, started: float) -> list[Facts]:
    """What every rank wrote since this attempt began, in rank order."""
    deadline = time.monotonic() + ARRIVAL_S
    facts: dict[int, Facts] = {}
    while True:
        for rank in range(topology.world_size):
            path = _arrival_path(paths, rank)
            if rank not in facts and path.is_file() and path.stat().st_mtime > started - ARRIVAL_S:
                facts[rank] = json.loads(path.read_text())
        if len(facts) == topology.world_size:
            return [facts[rank] for rank in sorted(facts)]
        if time.monotonic() > deadline:
            missing = [rank for rank in range(topology.world_size) if rank not in facts]
            raise _absent(missing, topology)
        time.sleep(POLL_S)


def _absent(missing: list[int], topology: Topology) -> ClusterError:
    nodes = node_names()
    positions = sorted({rank // topology.local_world_size for rank in missing})
    bad = [nodes[position] for position in positions if position < len(nodes)]
    where = (
        f"on {', '.join(bad)}" if bad else f"on node {', '.join(map(str, positions))} of the job"
    )
    remedy = f"leave it out (--exclude={','.join(bad)})" if bad else "leave that node out"
    return ClusterError(
        f"ranks {', '.join(map(str, missing))} {where} wrote nothing into the run folder",
        f"a sign of life from all {topology.world_size} ranks within {ARRIVAL_S:.0f} s",
        f"Check that the node runs and sees run.dir, or {remedy}.",
    )


def refuse_differences(facts: list[Facts]) -> None:
    """Raises ClusterError when a node has other versions or GPUs than most have."""
    for what in ("versions", "gpus", "num_gpus", "attention"):
        values = [json.dumps(rank[what], sort_keys=True) for rank in facts]
        usual = max(set(values), key=values.count)
        bad = sorted({f["node"] for f, value in zip(facts, values, strict=True) if value != usual})
        if bad:
            value = next(v for v in values if v != usual)
            raise ClusterError(
                f"{', '.join(bad)} has {what} {value}",
                f"{usual} as on the other nodes",
                f"Fix the installation there, or leave it out (--exclude={','.join(bad)}).",
            )


def check_disk(config: RunConfig, topology: Topology) -> Facts:
    """Free space of the run folder against what the run writes."""
    free = shutil.disk_usage(config.run.dir).free / GIB
    try:
        setup = make_setup(config, topology.world_size)
        work = prepared_work(config)
    except Exception as error:
        # a model or data that is wrong is for its own stage to refuse, in its own words
        _logger.info("doctor: disk not estimated (%s)", error)
        return {"free_disk_gib": free}
    needed = total(disk_sizes(config, setup, work)) / GIB
    if needed > free:
        raise ClusterError(
            f"{config.run.dir} has {free:.1f} GiB free",
            f"{needed:.1f} GiB for checkpoints and exports (`dpo-dist plan` has the arithmetic)",
            "Free space, lower checkpoint.keep, or put run.dir elsewhere.",
        )
    return {"free_disk_gib": free, "needed_disk_gib": needed}


def _hosts(facts: list[Facts]) -> list[str]:
    return sorted({rank["node"] for rank in facts})


def print_machine(facts: Facts) -> None:
    """Shows what one machine has, a line a thing."""
    others = facts["num_gpus"] - 1
    gpus = _gpus(facts) + (f" and {others} more" if others > 0 else "")
    lines = {
        "host": facts["host"],
        "GPUs": gpus,
        "cores": facts["cores"],
        "memory": f"{facts['memory_gib']} GiB",
        "free disk here": f"{facts['free_disk_gib']} GiB",
    } | facts["versions"]
    for name, value in lines.items():
        print(f"{name:<16} {value}")
    for backend, found in facts["attention"].items():
        print(f"{'attention':<16} {backend}: {found}")


def _gpus(facts: Facts) -> str:
    return ", ".join(f"{gpu['name']} {gpu['gib']} GiB" for gpu in facts["gpus"]) or "none"


def print_result(result: Facts) -> None:
    """Shows doctor.json, a row a rank."""
    table = Table("rank", "node", "GPU", "cores", "memory", "free disk", "torch", "deepspeed")
    for rank, facts in enumerate(result["ranks"]):
        versions = facts["versions"]
        table.add_row(
            str(rank), facts["node"], _gpus(facts), str(facts["cores"]),
            f"{facts['memory_gib']} GiB", f"{facts['free_disk_gib']} GiB",
            versions["torch"], versions["deepspeed"],
        )  # fmt: skip
    console.print(table)
    for backend, found in result["ranks"][0]["attention"].items():
        console.print(f"attention {backend}: {found}", highlight=False, soft_wrap=True)
    console.print(f"all-reduce {result['all_reduce_gib_per_s']:.2f} GiB/s")
    if "needed_disk_gib" in result:
        console.print(
            f"disk: {result['needed_disk_gib']:.1f} GiB expected, "
            f"{result['free_disk_gib']:.1f} GiB free"
        )
