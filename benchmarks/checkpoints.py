"""What a checkpoint costs: our blocking save, DeepSpeed's own, and the stall of one written behind.

    python benchmarks/checkpoints.py --model DIR --ranks 2 --folder DIR_ON_THE_DISK --repeats 3

Real ranks hold the model with AdamW's moments under --deepspeed. In each round all three save the
same state, one after the other; printed are medians over rounds and their ratios:

    DeepSpeed      engine.save_checkpoint, then os.sync of what it wrote
    blocking       hashed, made durable, committed by all ranks
    stall          until training may go on; the rest is written by a thread
    behind         from then until all ranks have committed
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.checkpoints import saving
from dpo_dist.engine.checkpoints.host_copies import HostCopies
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding import ds_config
from dpo_dist.engine.sharding.optimizers import make_optimizer
from dpo_dist.run.topology import Topology, from_environment

PORT = 29517


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deepspeed", default="zero3")
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args)
        return
    ranks = []
    for rank in range(args.ranks):
        topology = Topology(rank, args.ranks, rank, args.ranks, "127.0.0.1", PORT)
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | topology.environment()
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    sys.exit(max(process.wait() for process in ranks))


def measure(args: argparse.Namespace) -> None:
    topology = from_environment()
    with collectives.process_group(topology):
        engine, folder = make_engine(args, topology), args.folder / "checkpoints"
        copies = HostCopies(topology.local_world_size)
        rounds = [one_round(engine, folder, step, copies) for step in range(1, args.repeats + 2)]
        if not collectives.is_first():
            return
        size = sum(path.stat().st_size for path in folder.rglob("*.pt")) / 2  # two are kept
    print(f"{size / 2**30:.2f} GiB a checkpoint of {args.ranks} ranks, {args.deepspeed}")
    first, *rest = rounds
    print("first stall, which pays for the pages: {:.3f} s".format(first["stall"]))
    median = {name: statistics.median(each[name] for each in rest) for name in first}
    for name, seconds in median.items():
        print(f"{name:10} {seconds:7.3f} s   {seconds / median['blocking']:5.3f} of blocking")
    print(f"blocking / DeepSpeed {median['blocking'] / median['DeepSpeed']:.2f}")
    shutil.rmtree(args.folder)


def one_round(engine: Any, folder: Path, step: int, copies: HostCopies) -> dict[str, float]:
    """Seconds of each way, agreed over the ranks by a barrier before and after."""
    _, ranks = collectives.place()
    step, stage = 2 * step, engine.zero_optimization_stage()
    state = TrainState(step, step, 1.0, {}, ranks, stage)
    probe = np.array([0]), np.array([[-1.0, -2.0]], dtype=np.float32)
    seconds = {"DeepSpeed": timed(lambda: theirs(engine, folder.with_name("deepspeed")))}
    if collectives.is_first():
        shutil.rmtree(folder.with_name("deepspeed"))
    seconds["blocking"] = timed(lambda: saving.begin(engine, folder, state, *probe).commit(keep=2))
    begun: list[saving.Saving] = []
    state = TrainState(step + 1, step, 1.0, {}, ranks, stage)
    seconds["stall"] = timed(
        lambda: begun.append(saving.begin(engine, folder, state, *probe, copies))
    )
    seconds["behind"] = timed(lambda: begun[0].commit(keep=2))
    return seconds


def theirs(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="step", exclude_frozen_parameters=True)
    os.sync()


def timed(work: Any) -> float:
    collectives.barrier()
    start = time.monotonic()
    work()
    collectives.barrier()
    return time.monotonic() - start


def make_engine(args: argparse.Namespace, topology: Topology) -> Any:
    """The model after one update with made-up gradients, so that the moments are there."""
    import deepspeed
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    train = TrainSection.model_validate({"deepspeed": args.deepspeed, "learning_rate": 1e-6})
    config = ds_config.training_config(train, "float32", topology.world_size, universal=False)
    optimizer = make_optimizer(model, config, train)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.arange(8)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


if __name__ == "__main__":
    main()
