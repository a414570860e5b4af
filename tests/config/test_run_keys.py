"""Keys whose effect only a run shows: pairs of runs that differ in many keys at once.

Every key has an observation of its own, and the values that it must have without and with the
flip. Held-out pairs are training pairs with chosen and rejected exchanged: every evaluation is
worse than the one before, and the first one is the best.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.keys.flips import overrides
from support.keys.watched_run import Run, watched
from support.prepared import write_jsonl
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.tiny_run import make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.data.batches import step_pair_indices
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints.checkpoint import read_probe, read_train_state
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.load import load_model
from dpo_dist.run.manifest import read_manifest
from dpo_dist.stages import export, prepare

pytestmark = pytest.mark.timeout(300)
NUM_TRAIN, NUM_EVAL = 16, 4
BUDGET = 88  # tokens: enough for the longest pair, and for no two of the longer ones
TILE = 32  # tokens of an MLP's tile; fewer than any pair has
COMMON = {
    "data.train[].limit": NUM_TRAIN,
    "data.eval[].limit": NUM_EVAL,
    "data.eval[].path": "exchanged.jsonl",
    "data.on_overlap": "keep",
    "reference.store_dir": "store",
    "train.global_batch_size": 4,
    "checkpoint.every_steps": 2,
    "eval.every_steps": 2,
}


def most_tokens(forwards: list[list[list[int]]]) -> int:
    return max(sum(map(len, pairs)) for pairs in forwards)


def first_pairs(run: Run, count: int = 4) -> list[int]:
    """The indices of the pairs that were trained on first, sorted."""
    pairs = open_pairs(run.paths.pairs_dir, "train")
    index_of = {tuple(i for ids in pairs.token_ids(n) for i in ids): n for n in range(len(pairs))}
    trained = [index_of[tuple(ids)] for forward in run.forwards["trained"] for ids in forward]
    return sorted(trained[:count])


def first_of(seed: int, count: int = 4) -> list[int]:
    """The pairs that a seed puts first, sorted."""
    return sorted(step_pair_indices(0, NUM_TRAIN, count, seed).tolist())


@torch.no_grad()
def scored_with(run: Run) -> list[str]:
    """The models that give the reference log-probs of the first pair."""
    pairs = open_pairs(run.paths.pairs_dir, "train")
    rows = torch.from_numpy(run.store.lookup(pairs.keys[:1]))
    found = []
    for name in ("model", "other"):
        model = load_model(Path(name), run.config.model, device=torch.device("cpu"))
        logps = PairScorer(model)(pack_pairs([pairs.token_ids(0)], torch.device("cpu")))
        found += [name] if torch.allclose(logps, rows, atol=1e-3) else []
    return found


def exported_step(run: Run) -> int:
    return read_manifest(export.run(run.config) / "full").details["step"]


def pairs_a_step(run: Run) -> float:
    last = [line for line in run.lines if "loss" in line][-1]
    return last["consumed_pairs"] / last["step"]


@dataclass(frozen=True)
class Seen:
    """A flipped value, what shows its effect, and what must be seen without and with it."""

    value: Any
    of: Callable[[Run], Any]
    plain: Any
    flipped: Any


# A training with all these keys flipped: max_steps ends it after 6 steps of 2 pairs.
TRAINED: dict[str, Seen] = {
    "run.seed": Seen(7, first_pairs, first_of(42), first_of(7)),
    "train.global_batch_size": Seen(2, pairs_a_step, 4, 2),
    "train.max_steps": Seen(6, lambda run: run.lines[-1]["step"], 8, 6),
    "train.micro_batch_tokens": Seen(
        BUDGET, lambda run: most_tokens(run.forwards["trained"]) <= BUDGET, False, True
    ),
    "train.gradient_checkpointing": Seen(
        True, lambda run: run.forwards["recomputed"], False, True
    ),
    "train.tiled_mlp": Seen(
        TILE, lambda run: run.forwards["most_in_mlp"] <= TILE, False, True
    ),
    "train.offload_activations": Seen(
        True, lambda run: run.forwards["offloaded"], False, True
    ),
    "train.deepspeed": Seen(
        "zero2", lambda run: read_train_state(run.last_checkpoint).zero_stage, 3, 2
    ),
    "train.profile_steps": Seen(
        [2, 3], lambda run: run.paths.trace_path(0).exists(), False, True
    ),
    "train.non_finite": Seen(
        "skip", lambda run: run.steps_with("skipped_steps"), [], [2, 4, 6]
    ),
    "train.deterministic": Seen(
        True, lambda run: run.forwards["deterministic"], False, True
    ),
    "checkpoint.every_steps": Seen(1, lambda run: run.steps_kept[-2:], [6, 8], [5, 6]),
    "checkpoint.keep": Seen(3, lambda run: len(set(run.steps_kept) - {1}), 2, 3),
    "checkpoint.mode": Seen("blocking", lambda run: run.forwards["behind"], True, False),
    "checkpoint.best_by": Seen("eval_loss", lambda run: 1 in run.steps_kept, False, True),
    "checkpoint.probe_pairs": Seen(3, lambda run: len(read_probe(run.last_checkpoint)[0]), 8, 3),
    "eval.every_steps": Seen(
        1,
        lambda run: [step for step in run.steps_with("eval_loss") if step],
        [2, 4, 6, 8],
        [1, 2, 3, 4, 5, 6],
    ),
    "eval.on_start": Seen(
        True, lambda run: run.steps_with("eval_loss")[0], 2, 0
    ),
    "eval.samples_every_steps": Seen(
        3, lambda run: sorted({line["step"] for line in run.samples}), [], [0, 3, 6]
    ),
    "eval.num_samples": Seen(
        1, lambda run: sorted({line["number"] for line in run.samples}), [], [0]
    ),
    "export.checkpoint": Seen("newest", exported_step, 8, 6),
    "logging.every_steps": Seen(
        2, lambda run: run.steps_with("loss"), [1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6]
    ),
    "logging.tensorboard": Seen(
        True, lambda run: run.paths.tensorboard_dir.exists(), False, True
    ),
    "logging.wandb": Seen(True, lambda run: run.paths.wandb_dir.exists(), False, True),
    "logging.wandb_project": Seen(
        "our-project", lambda run: run.sent_to_wandb("our-project"), False, True
    ),
    "logging.wandb_name": Seen(
        "our-name", lambda run: run.sent_to_wandb("our-name"), False, True
    ),
}  # fmt: skip

# Both are needed to end a training whose evaluations get better and better.
ENDED: dict[str, Seen] = {
    "eval.patience": Seen(1, lambda run: run.lines[-1]["step"], 8, 4),
    "eval.min_delta": Seen(100.0, lambda run: run.lines[-1]["step"], 8, 4),
}

# A finished training is begun again: with `auto` nothing is left to do.
RESUMED: dict[str, Seen] = {
    "checkpoint.resume": Seen(
        "trained-plain/checkpoints/step-000006",
        lambda run: sum(map(len, run.forwards["trained"])),
        0,
        8,
    )
}

SCORED: dict[str, Seen] = {
    "reference.model": Seen("other", scored_with, ["model"], ["other"]),
    "reference.store_dir": Seen(
        "elsewhere", lambda run: run.forwards["stores"], ["store"], ["elsewhere"]
    ),
    "reference.sharding": Seen("zero3", lambda run: run.forwards["sharded"], False, True),
    "reference.micro_batch_tokens": Seen(
        BUDGET, lambda run: most_tokens(run.forwards["scored"]) <= BUDGET, False, True
    ),
    "reference.part": Seen(
        "1/2", lambda run: run.store.num_rows, NUM_TRAIN + NUM_EVAL, (NUM_TRAIN + NUM_EVAL) // 2
    ),
}


@dataclass(frozen=True)
class Group:
    """Keys that are flipped in one run of a stage, and what both runs have."""

    seen: Mapping[str, Seen]
    stage: str = "train"
    given: Mapping[str, Any] = field(default_factory=dict)


GROUPS = {
    "scored": Group(SCORED, "reference"),
    "trained": Group(TRAINED),
    "resumed": Group(RESUMED),
    "ended": Group(
        ENDED,
        given={"checkpoint.best_by": "eval_rewards/margins", "data.eval[].path": "train.jsonl"},
    ),
}
KEYS = [key for group in GROUPS.values() for key in group.seen]
Runs = Callable[[str, bool], Run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The run of a group, with its keys flipped or not; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    run_yaml = make_run(folder)
    shutil.copytree(folder / "model", folder / "other")
    size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    tiny_model("llama", seed=1, vocab_size=size).save_pretrained(folder / "other")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    exchanged = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_jsonl(folder / "exchanged.jsonl", exchanged)

    @functools.cache
    def run_of(name: str, flipped: bool) -> Run:
        group = GROUPS[name]
        if name != "scored":
            run_of("scored", False)  # fills the store
        out = folder / f"{name}-{'flipped' if flipped else 'plain'}"
        if name == "resumed":
            shutil.copytree(run_of("trained", False).paths.root, out)
        values = {key: seen.value for key, seen in group.seen.items()} if flipped else {}
        settings = [f"run.dir={out}", *overrides({**COMMON, **group.given, **values})]
        config = load_config(run_yaml, settings)
        prepare.run(config)
        (forwards,) = run_ranks(1, watched, group.stage, str(run_yaml), settings)
        return Run(config, forwards)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        yield run_of


@pytest.mark.parametrize("key", KEYS)
def test_flipping_a_key_of_a_run(key: str, runs: Runs) -> None:
    (name,) = (name for name, group in GROUPS.items() if key in group.seen)
    seen = GROUPS[name].seen[key]
    assert seen.of(runs(name, False)) == seen.plain
    assert seen.of(runs(name, True)) == seen.flipped


def test_the_runs_are_as_the_observations_need_them(runs: Runs) -> None:
    """Evaluations get worse in one group, so that the first is the best, and better in another."""
    losses = [line["eval_loss"] for line in runs("trained", True).lines if "eval_loss" in line]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    margins = [
        line["eval_rewards/margins"]
        for line in runs("ended", True).lines
        if "eval_rewards/margins" in line
    ]
    assert len(margins) == 2 and margins[0] < margins[1] < margins[0] + 100
