"""A run that is ready to be exported: pairs, and a checkpoint of a policy moved at random.

The checkpoint has the layout of ZeRO stage 0, which one process writes without an engine.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support.tiny_run import make_run
from support.weights.trained_weights import InMemory, adapted, randomly_trained

from dpo_dist.config.resume_identity import training_identity
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints.commit import commit, record_files
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.load import load_model
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.model_files.files import digest_of_weights
from dpo_dist.run.run_dir import PROBE_NAME, TRAIN_STATE_NAME, RunDir
from dpo_dist.stages import prepare

NUM_PROBE_PAIRS = 4


@dataclass(frozen=True)
class TrainedRun:
    """A config, its policy in memory, and the checkpoint of the same weights."""

    config: RunConfig
    policy: Any
    trained: InMemory
    step_dir: Path

    @property
    def paths(self) -> RunDir:
        return RunDir(self.config.run.dir)


def make_trained_run(folder: Path, family: str = "llama", *overrides: str) -> TrainedRun:
    """Writes everything below `folder`; overrides are those of the command line."""
    return trained_run(load_config(make_run(folder, family), list(overrides)))


def trained_run(config: RunConfig) -> TrainedRun:
    """Prepares the pairs of a run and writes a checkpoint as if it had been trained."""
    prepare.run(config)
    model_dir = Path(config.model.path)
    model: Any = load_model(model_dir, config.model, device=torch.device("cpu"))
    if config.adapter is None:
        policy, trained = model, randomly_trained(model)
    else:
        policy, trained = adapted(model, config.adapter, model_dir)
    paths = RunDir(config.run.dir)
    step_dir = write_checkpoint(config, policy, trained, step=6)
    lines = [{"step": step, "loss": 1 / step, "rewards/margins": 0.1 * step} for step in (2, 4, 6)]
    lines.append({"step": 6, "eval_loss": 0.25, "eval_rewards/accuracies": 0.875})
    paths.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainedRun(config, policy, trained, step_dir)


def write_checkpoint(
    config: RunConfig, policy: Any, trained: InMemory, step: int, last_step: int | None = None
) -> Path:
    """Commits a checkpoint of the policy with its probe; training ends with its step by default."""
    paths = RunDir(config.run.dir)
    step_dir = paths.checkpoint_dir(step)
    step_dir.mkdir(parents=True)
    shard = {"module": dict(trained.tensors), "buffer_names": []}
    torch.save(shard, step_dir / "mp_rank_00_model_states.pt")
    digests = training_identity(config) | {"train.max_steps": str(last_step or step)}
    digests |= {"model": digest_of_weights(Path(config.model.path))}
    state = TrainState(
        step=step, consumed_pairs=8 * step, epoch=1.2, digests=digests, world_size=1, zero_stage=0
    )
    (step_dir / TRAIN_STATE_NAME).write_text(state.to_json())
    indices = np.arange(NUM_PROBE_PAIRS)
    probe = {"pair_index": torch.from_numpy(indices), "logps": score(config, policy, indices)}
    save_file(probe, step_dir / PROBE_NAME)
    commit(step_dir, record_files(step_dir))
    return step_dir


@torch.no_grad()
def score(config: RunConfig, policy: Any, indices: Any) -> torch.Tensor:
    """(K, 2) log-probs of training pairs, by a copy: scoring changes a model's attention."""
    scorer = PairScorer(copy.deepcopy(policy)).eval()
    settle_layout(scorer, scorer, config.model, torch.device("cpu"))
    pairs = open_pairs(RunDir(config.run.dir).pairs_dir, "train")
    packed = pack_pairs([pairs.token_ids(index) for index in indices.tolist()])
    return scorer(packed)
