"""Keys of `objective`: each is flipped, and the losses of real pairs change."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.keys.flips import Flip, assert_effect
from support.tiny_models import tiny_model
from support.tiny_run import make_run

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.forward.model_parts import num_experts
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.inputs.scored_pairs import ScoredPairs, objective_of
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.stages import prepare

NUM_PAIRS, VOCABULARY = 4, 600
CPU = torch.device("cpu")


@torch.no_grad()
def losses_of(config: RunConfig) -> list[float]:
    """The losses of a step of pairs by a tiny mixture of experts, as training computes them."""
    pairs = open_pairs(Path("out/pairs"), "train")
    ids = [pairs.token_ids(index) for index in range(NUM_PAIRS)]
    policy, reference = (PairScorer(model(seed)) for seed in (0, 1))
    scored = ScoredPairs(pairs, reference(pack_pairs(ids, CPU)))
    objective = objective_of(config)
    terms = objective.terms(num_experts(policy.policy))
    columns = policy(pack_pairs(ids, CPU, terms))
    logps = scored.logps(columns, np.arange(NUM_PAIRS), terms)
    return pair_losses(logps, objective).tolist()


def model(seed: int) -> torch.nn.Module:
    return tiny_model("mixtral", seed=seed, vocab_size=VOCABULARY)


FLIPS = [
    Flip("objective.loss", "ipo", losses_of),
    Flip("objective.loss_weights", [0.5], losses_of),
    Flip("objective.beta", 0.2, losses_of),
    Flip("objective.label_smoothing", 0.2, losses_of),
    Flip("objective.f_divergence_type", "js_divergence", losses_of),
    Flip(
        "objective.f_alpha_divergence_coef", 0.7, losses_of,
        {"objective.f_divergence_type": "alpha_divergence"},
    ),
    Flip("objective.discopop_tau", 0.5, losses_of, {"objective.loss": "discopop"}),
    Flip("objective.simpo_gamma", 1.0, losses_of, {"objective.loss": "simpo"}),
    Flip("objective.ld_alpha", 0.5, losses_of),
    Flip("objective.use_weighting", True, losses_of),
    Flip("objective.router_aux_loss_coef", 0.1, losses_of),
]  # fmt: skip


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with its pairs, in the folder where its tests run."""
    folder = tmp_path_factory.mktemp("objective")
    path = make_run(folder)
    prepare.run(load_config(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield path


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_the_objective(flip: Flip, run_yaml: Path) -> None:
    assert_effect(flip, run_yaml)
