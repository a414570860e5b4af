"""What depends on the number of pairs: seconds and memory of everything around the model.

    python benchmarks/scale.py --pairs 1000000 3000000 10000000 --folder DIR_ON_THE_DISK

Made-up pairs of a few tokens and a store with a row for each are written once per number, as
`prepare` and the reference pass leave them: 256 pairs in a record batch, parts of 4,096 rows. Every
part is measured in a process of its own, the start of a resumed training on two ranks that meet
over gloo. Memory is the peak of RssAnon, which leaves out mapped files, above what the process had
after its imports. Model and tokenizer are never opened.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.data.batches import plan_micro_batches, plan_scoring_batches, step_pair_indices
from dpo_dist.data.pairs import DATA_NAME, EARLIER_SCHEMA, digest_of_keys, open_pairs
from dpo_dist.inputs.scored_pairs import with_reference
from dpo_dist.inputs.work import prepared_work
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import scoring_contract
from dpo_dist.reference.pair_key import KEY_BYTES, KEY_DTYPE
from dpo_dist.reference.parts import ROW_DTYPE, publish_part
from dpo_dist.reference.store import ReferenceStore, open_store
from dpo_dist.run.manifest import Manifest, digest_of_hex, write_manifest

BATCH_ROWS, PART_ROWS, NUM_HELD_OUT = 256, 4096, 1000
# as many pairs a wave as 16,384 tokens hold of pairs of real length
RANKS, TOKENS, STEP_PAIRS, NUM_APPENDS = 8, 512, 256, 30
LOOK_EVERY_S = 0.002
PORT = 29519
FORK = multiprocessing.get_context("fork")  # imports once


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    pa.array([0]).to_numpy()  # imports pandas
    columns: list[dict[str, str]] = []
    for num_pairs in args.pairs:
        folder = args.folder / str(num_pairs)
        making = FORK.Process(target=make_run, args=(folder, num_pairs))
        making.start()
        making.join()
        columns.append({})
        for part in args.only:
            columns[-1] |= run_part(part, folder)
    print("| |", *(f"{num_pairs:,} pairs |" for num_pairs in args.pairs))
    print("| --- |", *("--- |" for _ in args.pairs))
    for name in columns[0]:
        print(f"| {name} |", *(f"{found[name]} |" for found in columns))


# What is measured. Every part yields names; the time and memory from one name to the next count.


def opening(config: RunConfig) -> Iterator[str]:
    yield "open the pairs of both splits"
    prepared_work(config)


def planning(config: RunConfig) -> Iterator[str]:
    lengths = open_pairs(config.run.dir / "pairs", "train").packed_lengths
    middle = len(lengths) // STEP_PAIRS // 2
    for name, step in (("plan the first step", middle), ("plan another step", middle + 1)):
        yield name
        pairs = step_pair_indices(step, len(lengths), STEP_PAIRS, 0)
        plan_micro_batches(lengths, pairs, RANKS, TOKENS)


def scoring_plan(config: RunConfig) -> Iterator[str]:
    lengths = open_pairs(config.run.dir / "pairs", "train").packed_lengths
    pairs = np.arange(len(lengths))
    yield "plan of the reference pass: first wave"
    waves = iter(plan_scoring_batches(lengths, pairs, RANKS, TOKENS))
    next(waves)
    yield "plan of the reference pass: the other waves"
    sum(1 for _ in waves)


def appending(config: RunConfig) -> Iterator[str]:
    full, random = store_of(config), np.random.default_rng(1)
    with tempfile.TemporaryDirectory(dir=config.run.dir) as folder:
        empty, copy = Path(folder) / "empty", Path(folder) / "copy"
        shutil.copytree(full.directory, copy, copy_function=os.link)
        for name, directory in (("an empty store", empty), ("the full store", copy)):
            store, seconds = ReferenceStore(directory, full.contract), list[float]()
            yield ""
            for _ in range(NUM_APPENDS):
                rows = made_up_rows(random, PART_ROWS)
                start = time.perf_counter()
                store.append(rows["key"].copy(), rows["logps"].copy(), np.arange(PART_ROWS))
                seconds.append(time.perf_counter() - start)
            told = f"{statistics.median(seconds):.3f} s (at most {max(seconds):.2f})"
            yield f"append {PART_ROWS:,} rows to {name}|{told}"


def looking_up(config: RunConfig) -> Iterator[str]:
    keys = open_pairs(config.run.dir / "pairs", "train").keys
    yield "open the store"
    store = store_of(config)
    yield "look all pairs up"
    found = torch.from_numpy(store.lookup(keys))
    yield "digest of the reference"
    digest_of_hex(found.numpy().reshape(-1).view(np.uint8).data)


def resuming(config: RunConfig) -> Iterator[str]:
    """What of a start depends on the pairs, up to the first forward, as the train stage does it."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    yield f"start of a resumed training, rank {rank}"
    work = prepared_work(config)
    assert work is not None
    assert work.train.digest
    train, _ = with_reference(models_of(config), [work.train, work.held_out], "packed")
    assert train.reference_digest
    pairs = step_pair_indices(work.num_steps // 2, len(work.train), STEP_PAIRS, 0)
    plan = plan_micro_batches(work.train.packed_lengths, pairs, RANKS, TOKENS)
    indices = plan[rank][0].pair_indices
    train.logps(torch.zeros(len(indices), 2), indices, step=pairs)
    yield ""
    dist.barrier()


PARTS: dict[str, Callable[[RunConfig], Iterator[str]]] = {
    part.__name__: part
    for part in (opening, planning, scoring_plan, appending, looking_up, resuming)
}


# How it is measured.


def measure(part: str, folder: Path, rank: int, parent: Connection) -> None:
    """In a process of its own: tells its parent where a part is, and waits for the answer."""
    os.environ |= {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    config, name = config_of(folder), ""
    wall, cpu = time.perf_counter(), time.process_time()
    for following in itertools.chain([""], PARTS[part](config), [""]):
        told = f"{time.perf_counter() - wall:.2f} s ({time.process_time() - cpu:.2f} of CPU)"
        following, _, own = following.partition("|")
        if own:  # a part that has timed itself
            name, told, following = following, own, ""
        parent.send((name, told))
        parent.recv()
        name, wall, cpu = following, time.perf_counter(), time.process_time()


def run_part(part: str, folder: Path) -> dict[str, str]:
    """Each name of a part -> seconds and MiB."""
    found: dict[str, str] = {}
    watchers: list[threading.Thread] = []
    for rank in range(2 if part == "resuming" else 1):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=measure, args=(part, folder, rank, theirs))
        process.start()
        theirs.close()
        watchers.append(threading.Thread(target=watch, args=(process.pid, ours, found)))
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    return found


def watch(pid: int, child: Connection, found: dict[str, str]) -> None:
    """Samples a child's memory; the peak of each name counts from when it was answered."""
    imported, peak = None, 0
    with contextlib.suppress(EOFError):
        while True:
            peak = max(peak, anonymous_mib(pid))
            if child.poll(LOOK_EVERY_S):
                name, told = child.recv()
                if imported is None:
                    imported = anonymous_mib(pid)
                if name:
                    found[name] = f"{told}, {max(peak - imported, 0):,} MiB"
                    print(f"{name}: {found[name]}", file=sys.stderr)
                peak = 0
                child.send(None)


def anonymous_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    # gone once the process has ended and waits to be collected
    return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) >> 10 if "Rss" in status else 0


# What is measured on.


def make_run(folder: Path, num_pairs: int) -> None:
    """Pairs and a store; what an earlier call has made is taken."""
    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    rows = made_up_rows(random, num_pairs + NUM_HELD_OUT)
    for split, keys in (
        ("train", rows["key"][:num_pairs].copy()),
        ("eval", rows["key"][num_pairs:].copy()),
    ):
        (folder / "pairs" / split).mkdir(parents=True)
        path = str(folder / "pairs" / split / DATA_NAME)
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, EARLIER_SCHEMA) as writer:
            for start in range(0, len(keys), BATCH_ROWS << 12):
                block = keys[start : start + (BATCH_ROWS << 12)]
                writer.write_table(made_up_pairs(random, block), max_chunksize=BATCH_ROWS)
        splits[split] = {"num_pairs": len(keys), "digest": digest_of_keys(keys)}
    write_manifest(folder / "pairs", Manifest("prepare", {}, {}, {"splits": splits}))
    store = store_of(config_of(folder))
    store.directory.mkdir(parents=True)
    for start in range(0, len(rows), PART_ROWS):
        part = rows[start : start + PART_ROWS]
        publish_part(store.directory, part[np.argsort(part["key"])], store.contract.digest())
    (folder / "made").touch()


def made_up_rows(random: np.random.Generator, count: int) -> Any:
    rows = np.empty(count, dtype=ROW_DTYPE)
    rows["key"] = np.frombuffer(random.bytes(count * KEY_BYTES), dtype=KEY_DTYPE)
    rows["logps"] = random.normal(-300, 99, (count, 2))
    return rows


def made_up_pairs(random: np.random.Generator, keys: Any) -> pa.Table:
    """Pairs of 3 to 33 tokens in all, of two sources."""

    def lists() -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(random.integers(1, 12, len(keys)))])
        tokens = random.integers(0, 50_000, offsets[-1], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))

    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )
    names = pa.array(["first", "second"]).take(pa.array(random.integers(0, 2, len(keys))))
    origins = pa.array(np.arange(len(keys))).cast(pa.string())
    return pa.table([lists(), lists(), lists(), column, names, origins], schema=EARLIER_SCHEMA)


def config_of(folder: Path) -> RunConfig:
    settings = {
        "run": {"dir": str(folder)},
        "model": {"path": "none"},
        "data": {"train": [{"path": "none"}], "eval": [{"path": "none"}]},
        "train": {"global_batch_size": STEP_PAIRS, "micro_batch_tokens": TOKENS},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return load_config(path)


def models_of(config: RunConfig) -> RunModels:
    """Two digests, where a run has files."""
    digests = {"reference_digest": "aa" * 32, "tokenizer_digest": "bb" * 32}
    return cast(RunModels, SimpleNamespace(config=config, **digests))


def store_of(config: RunConfig) -> ReferenceStore:
    return open_store(config.run.dir / "reference", scoring_contract(models_of(config), "packed"))


if __name__ == "__main__":
    main()
