"""Keys of `train` that make the optimizer, the schedule, the sharding and the number of steps.

The other ones are flipped in a real training: test_run_keys.py.
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.keys.flips import Flip, assert_effect
from support.ranks import run_ranks
from support.tiny_run import make_run
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_scheduler,
    get_wsd_schedule,
)

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.model_parts import backbone_of
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.model.policy import PolicyParts, load_policy
from dpo_dist.engine.sharding import ds_config, optimizers, schedule
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.inputs.frozen_model import open_frozen, place_model
from dpo_dist.inputs.work import checked_work
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.topology import from_environment
from dpo_dist.stages import prepare

NUM_STEPS = 20


def sharding_of(config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed is told on two ranks."""
    return ds_config.training_config(config.train, config.model.dtype, 2)


def optimizer_of(config: RunConfig) -> dict[str, Any]:
    """The kind of the optimizer and the settings of its parameter group."""
    optimizer = optimizers.make_optimizer(torch.nn.Linear(2, 2), sharding_of(config), config.train)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return group | {"kind": type(optimizer).__name__}


def learning_rates(config: RunConfig) -> list[float]:
    """The schedule over NUM_STEPS steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    made, rates = schedule.make_schedule(optimizer, config.train, NUM_STEPS), []
    for _ in range(NUM_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


def steps_of(config: RunConfig) -> int:
    """The optimizer steps that the prepared pairs make."""
    prepare.run(config)
    return checked_work(RunModels(config)).num_steps


def may_save_as_another(config: RunConfig) -> bool:
    """Whether training starts where files do not come out as those of its user."""
    prepare.run(config)
    with mock.patch.object(os, "geteuid", lambda: os.getuid() + 1):
        try:
            return bool(checked_work(RunModels(config)).num_steps)
        except CheckpointError:
            return False


def tokens_of_ranks(config: RunConfig) -> list[int]:
    """What passes the model on each of two ranks that score the same pair of 12 tokens."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(config.model_dump_json())
        file.flush()
        return run_ranks(2, count_tokens, file.name)


def count_tokens(resolved: str) -> int:
    config, topology = load_config(Path(resolved), []), from_environment()
    seen: list[int] = []
    with collectives.process_group(topology) as device:
        folder = Path(config.model.path)
        policy = load_policy(PolicyParts(folder, config.model), device)
        frozen = open_frozen(policy, place_model(config, folder, topology, device, "test"))
        embedding = backbone_of(policy).get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
        score_pairs(frozen.model, pack_pairs([([5] * 6, [6] * 4, [7] * 2)], device))
    return sum(seen)


FLIPS = [
    Flip("train.sequence_parallel", 2, tokens_of_ranks, {"reference.sharding": "whole"}),
    Flip("train.num_epochs", 3.0, steps_of),
    Flip("train.optimizer", "adamw_8bit", optimizer_of),
    Flip("train.learning_rate", 1e-2, optimizer_of),
    Flip("train.lr_schedule", "linear", learning_rates),
    Flip("train.min_lr_rate", 0.1, learning_rates),
    Flip("train.warmup_ratio", 0.5, learning_rates),
    Flip("train.warmup_steps", 5, learning_rates, {"train.warmup_steps": 2}),
    Flip("train.decay_steps", 0.5, learning_rates, {"train.lr_schedule": "wsd"}),
    Flip(
        "train.decay_shape",
        "1-sqrt",
        learning_rates,
        {"train.lr_schedule": "wsd", "train.decay_steps": 10},
    ),
    Flip("train.weight_decay", 0.1, optimizer_of),
    Flip("train.adam_beta1", 0.8, optimizer_of),
    Flip("train.adam_beta2", 0.95, optimizer_of),
    Flip("train.adam_eps", 1e-6, optimizer_of),
    Flip("train.max_grad_norm", 0.1, sharding_of),
    Flip("checkpoint.trusted_owners", [os.getuid()], may_save_as_another),
]


def multiples(make: Callable[..., Any], **settings: Any) -> list[float]:
    """The shares of the peak that one of transformers' schedules gives, a step after another."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=2.0)
    made, shares = make(optimizer, **settings), []
    for _ in range(NUM_STEPS):
        shares.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        made.step()
    return shares


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_a_cosine_that_ends_above_zero_is_that_of_transformers(rate: float) -> None:
    train = TrainSection(min_lr_rate=rate, warmup_ratio=0.2)
    ours = multiples(schedule.make_schedule, train=train, num_steps=NUM_STEPS)
    settings: dict[str, Any] = {"num_warmup_steps": 4, "num_training_steps": NUM_STEPS}
    assert ours == multiples(
        get_cosine_with_min_lr_schedule_with_warmup, **settings, min_lr=2 * rate
    )
    # its other one is a step ahead: the warm-up does not begin at 0
    ahead = multiples(
        get_cosine_with_min_lr_schedule_with_warmup_lr_rate, **settings, min_lr_rate=rate
    )
    assert ours[1:] == pytest.approx(ahead[:-1])
    formula = [
        step / 4 if step < 4 else rate + (1 - rate) * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        for step in range(NUM_STEPS)
    ]
    assert ours == pytest.approx(formula)


FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "1-sqrt": lambda p: 1 - math.sqrt(p),
}


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    ("keys", "warmup", "decay"),
    [
        ({"warmup_steps": 3, "decay_steps": 6}, 3, 6),
        ({"warmup_ratio": 0.11, "decay_steps": 0.31}, 3, 7),
        ({"warmup_steps": 0, "decay_steps": 1}, 0, 1),
        ({"warmup_steps": 12, "decay_steps": 8}, 12, 8),
        ({}, 2, 2),
    ],
    ids=str,
)
def test_wsd_is_that_of_transformers_at_every_step(
    keys: dict[str, Any], warmup: int, decay: int, rate: float, shape: str
) -> None:
    train = TrainSection.model_validate(
        {"lr_schedule": "wsd", "decay_shape": shape, "min_lr_rate": rate, **keys}
    )
    ours = multiples(schedule.make_schedule, train=train, num_steps=NUM_STEPS)
    settings: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": NUM_STEPS}
    of_decay = {"num_decay_steps": decay, "decay_type": shape, "min_lr_ratio": rate}
    assert ours == multiples(get_wsd_schedule, **settings, **of_decay)
    start = NUM_STEPS - decay
    formula = [rate + (1 - rate) * step / max(warmup, 1) for step in range(warmup)]
    formula += [1.0] * (start - warmup)
    formula += [rate + (1 - rate) * FALLS[shape](step / decay) for step in range(decay)]
    assert ours == pytest.approx(formula)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 5, NUM_STEPS, NUM_STEPS + 3])
def test_a_warm_up_of_so_many_steps_is_that_of_transformers(name: str, warmup: int) -> None:
    train = TrainSection.model_validate({"lr_schedule": name, "warmup_steps": warmup})
    ours = multiples(schedule.make_schedule, train=train, num_steps=NUM_STEPS)
    theirs = "constant_with_warmup" if name == "constant" else name
    settings: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": NUM_STEPS}
    assert ours == multiples(lambda *args, **kw: get_scheduler(theirs, *args, **kw), **settings)


def test_a_decay_that_does_not_fit_is_refused() -> None:
    train = TrainSection(lr_schedule="wsd", warmup_steps=12, decay_steps=9)
    with pytest.raises(ConfigError) as caught:
        schedule.warmup_and_decay(train, NUM_STEPS)
    assert str(caught.value) == (
        "train.lr_schedule: wsd with 12 steps of warmup and 9 of decay in a run of 20; expected at "
        "most 20 together. Lower train.decay_steps or the warmup, or train for longer."
    )


def test_a_share_of_warmup_by_default_gives_way_to_steps() -> None:
    assert TrainSection(warmup_steps=5).warmup_ratio is None
    assert TrainSection.model_validate({"warmup_ratio": None}).warmup_ratio == 0.1


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_training(flip: Flip, run_yaml: Path) -> None:
    if flip.value == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    assert_effect(flip, run_yaml)
