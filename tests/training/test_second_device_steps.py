"""A training step on a second device: every loss, and what the host waits for between two updates.

The loop is the stage's own. DeepSpeed's engine is replaced by one that only calls `backward`, since
it needs a real device; a stop flag ends the loop where the ranks would add up their sums.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.devices.chosen import chosen_names, few_of
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.tiny_run import make_run
from torch import nn

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import Pairs
from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.forward.scoring import score
from dpo_dist.engine.sharding import zero
from dpo_dist.inputs.scored_pairs import ScoredPairs, objective_of
from dpo_dist.inputs.work import checked_work
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.objective.losses import LOSSES
from dpo_dist.run.topology import from_environment
from dpo_dist.stages import prepare, train
from dpo_dist.training.job import Job
from dpo_dist.training.sums import StepSums

SETTINGS = {"exo_pair": ["objective.label_smoothing=0.1"]}
CASES = {name: [f"objective.loss={name}", *SETTINGS.get(name, [])] for name in LOSSES} | {
    "weighted, long answers less": ["objective.use_weighting=true", "objective.ld_alpha=0.5"],
    "several": ["objective.loss=[sigmoid,sft]", "objective.ld_alpha=0.5"],
    "balanced routers": ["objective.router_aux_loss_coef=0.01"],
    "alpha divergence": ["objective.f_divergence_type=alpha_divergence"],
}
FEW = ("sigmoid", "aot", "weighted, long answers less", "several", "balanced routers")  # by default
COUPLED = ("aot", "aot_unpaired", "balanced routers")
# Of a micro-batch: the packed row, where its calls end, the lengths and the reference of its pairs.
ROW, ENDS, LOOK_UP = 4, 2, 2
PAIRS = 3  # of a step
ROUTERS = 2  # which part of the row a token is of, and which parts a pair has


class Engine(nn.Module):
    """What the loop asks of DeepSpeed's engine."""

    def __init__(self, scorer: PairScorer) -> None:
        super().__init__()
        self.module = scorer

    def forward(self, *args: Any) -> torch.Tensor:
        return self.module(*args)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def zero_optimization(self) -> bool:
        return False

    bfloat16_enabled = zero_optimization


class EndOfMicroBatchesError(Exception):
    pass


class StopAfterMicroBatches:
    def __bool__(self) -> bool:
        raise EndOfMicroBatchesError


def worker(run_yaml: str, chosen: list[str]) -> dict[str, Any]:
    """Of each case what crossed in the micro-batches of a step."""
    from support.devices.second_device import second_device

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    config = load_config(Path(run_yaml), ["objective.loss=sigmoid"])
    prepare.run(config)
    seen: dict[str, Any] = {}
    for name in chosen:
        job = job_of(load_config(Path(run_yaml), CASES[name]))
        with second_device() as device:
            seen[name] = step_on(device, job)
    job = job_of(config)
    with second_device() as device:
        seen["around"] = around_the_step(device, job)
    return seen


def job_of(config: Any) -> Job:
    family = "mixtral" if config.objective.router_aux_loss_coef else "llama"
    policy = tiny_model(family, dtype=torch.bfloat16, vocab_size=500)
    work, objective = checked_work(RunModels(config)), objective_of(config)
    train_pairs, held_out = (
        ScoredPairs(pairs, torch.zeros(len(pairs), 2)) for pairs in (work.train, work.held_out)
    )
    experts = num_experts(policy) if config.objective.router_aux_loss_coef else 0
    return Job(
        RunModels(config), from_environment(), torch.device("cpu"), Engine(PairScorer(policy)),
        train_pairs, held_out, work.num_steps, objective, objective.terms(experts),
    )  # fmt: skip


def on(device: torch.device, job: Job) -> Job:
    from support.devices.second_device import on_device

    return replace(job, device=device, engine=on_device(job.engine.train()))


def step_on(device: torch.device, job: Job) -> dict[str, Any]:
    from support.devices.second_device import Traffic

    job, stop, records = on(device, job), StopAfterMicroBatches(), None
    with Traffic() as traffic, readers_of_pairs() as readers:
        with pytest.raises(EndOfMicroBatchesError):
            train._train(job, 1, records, stop)  # pyright: ignore
        threads_left = [t.name for t in threading.enumerate() if t.name.startswith("ahead")]
    return {
        "readers": readers,
        "threads_left": threads_left,
        "micro_batches": len(job.micro_batches(1)),
        "uploads": traffic.uploads,
        "blocking": traffic.blocking,
        "waits": traffic.waits,
        "gradients": all(p.grad is not None for p in job.engine.parameters()),
    }


@contextlib.contextmanager
def readers_of_pairs() -> Iterator[Counter[str]]:
    """How many pairs each thread reads, by what its name begins with."""
    readers: Counter[str] = Counter()
    read = Pairs.token_ids

    def token_ids(pairs: Pairs, index: int) -> Any:
        readers[threading.current_thread().name.split("_")[0]] += 1
        return read(pairs, index)

    with mock.patch.object(Pairs, "token_ids", token_ids):
        yield readers


def around_the_step(device: torch.device, job: Job) -> dict[str, Any]:
    """What else the host waits for: sums and norm of a step, the scores of many micro-batches."""
    from support.devices.second_device import Traffic

    job = on(device, job)
    waits: dict[str, Any] = {}
    with Traffic() as traffic:
        StepSums.zeros(job.objective, device).over_ranks(stopping=False, written=False)
    waits["sums"] = traffic.waits
    for parameter in job.engine.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Traffic() as traffic:
        nn.utils.clip_grad_norm_(job.engine.parameters(), 1.0)
    waits["clip"] = traffic.waits
    with Traffic() as traffic:
        zero._plain_norm(job.engine)
    waits["norm"] = traffic.waits
    batches = job.micro_batches(1)
    with Traffic() as traffic, readers_of_pairs() as readers:
        score(job.engine, batches, job.train.pairs.token_ids, device)
    waits["scores"], waits["readers of scores"] = traffic.waits, [*readers]
    return waits


@pytest.fixture(scope="module")
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run_yaml = make_run(tmp_path_factory.mktemp("second"))
    for key, value in (("micro_batch_tokens", 100), ("global_batch_size", PAIRS)):
        text, count = re.subn(rf"(?<= {key}: )\d+", str(value), run_yaml.read_text())
        assert count == 1 and run_yaml.write_text(text)
    return run_ranks(1, worker, str(run_yaml), chosen_names(request), timeout_s=400)[0]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", few_of(CASES, FEW))
def test_the_micro_batches_of_a_step_do_not_wait(name: str, seen: dict[str, Any]) -> None:
    found = seen[name]
    count = found["micro_batches"]
    assert count > 1 and found["gradients"]
    # all pairs are read and packed beside the loop, and each row is uploaded from the loop
    assert found["readers"] == {"ahead": PAIRS * (1 + (name in COUPLED))}
    assert found["threads_left"] == []
    forward = ROW + ENDS + ROUTERS * (name == "balanced routers")
    if (
        name in COUPLED
    ):  # a forward ahead, whose scores all ranks exchange before the first backward
        assert found["uploads"] == 2 * count * forward + len(found["blocking"]) + LOOK_UP
        assert found["blocking"] == ["coupled.py:step_gradients"]
        assert found["waits"] == ["scoring.py:score"]
    else:
        assert found["uploads"] == count * (forward + LOOK_UP)
        assert (found["blocking"], found["waits"]) == ([], [])


def test_what_is_waited_for_once(seen: dict[str, Any]) -> None:
    assert seen["around"] == {
        "sums": ["sums.py:over_ranks"],
        "clip": [],
        "norm": ["zero.py:_plain_norm"],
        "scores": ["scoring.py:score"],
        "readers of scores": ["ahead"],
    }
