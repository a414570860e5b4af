"""The forward inside a DeepSpeed ZeRO-3 engine on two real ranks, against one plain process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import adapted, plain_scores
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.layout_choice import choose_layout
from dpo_dist.engine.forward.packing import PairIds, pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.run.topology import from_environment

WORLD_SIZE = 2
LEARNING_RATE = 1e-3

# family, adapter, gradient checkpointing (reentrant or not), expected layout
CASES: dict[str, tuple[str, dict[str, Any] | None, bool | None, str]] = {
    "full": ("llama", None, None, "packed"),
    "full, tied, recomputed": ("llama_tied", None, False, "packed"),
    "full, head with bias": ("phi", None, None, "packed"),
    "full, sinks, recomputed": ("gpt_oss", None, True, "packed"),
    "adapter, tied, recomputed": ("llama_tied", {}, True, "packed"),
    "adapter, trained head": ("llama", {"modules_to_save": ["lm_head"]}, None, "packed"),
    "state space": ("mamba", None, None, "padded"),
    "refused within a layer": ("stablelm", None, None, "padded"),
}


def micro_batches(rank: int) -> list[list[PairIds]]:
    """Two of a rank, with one or two pairs of uneven lengths in each."""
    rng = random.Random(rank)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 128) for _ in range(rng.randrange(1, most))]

    return [[(ids(20), ids(9), ids(9)) for _ in range(count)] for count in (1 + rank, 2 - rank)]


def policy_of(case: str) -> Any:
    family, adapter, reentrant, _ = CASES[case]
    policy: Any = tiny_model(family) if adapter is None else adapted(family, **adapter)
    if reentrant is not None:
        policy.activation_checkpointing_enable({"use_reentrant": reentrant})
        policy.enable_input_require_grads()
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return policy.train()


def loss_of(scores: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(0.3 * (scores[:, 0] - scores[:, 1])).sum()


def train_on_ranks(folder: str) -> dict[str, Any]:
    """One optimizer step of every case: its layout and this rank's scores before and after."""
    with collectives.process_group(from_environment()):
        return {case: train_case(case, Path(folder)) for case in CASES}


def train_case(case: str, folder: Path) -> dict[str, Any]:
    import deepspeed

    scorer = PairScorer(policy_of(case))
    trainable = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=scorer,
        # Plain descent, so that what the step changes is the gradient and nothing else.
        optimizer=torch.optim.SGD(trainable, lr=LEARNING_RATE),
        config={
            "train_batch_size": WORLD_SIZE,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # DeepSpeed's own default is 1
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 40,
        },
        dist_init_required=False,
    )
    engine.train()
    scorer.layout, reason = choose_layout(engine, torch.device("cpu"))
    rank = torch.distributed.get_rank()
    packed = [pack_pairs(pairs) for pairs in micro_batches(rank)]
    before: list[list[float]] = []
    for index, micro_batch in enumerate(packed):
        scores = score_pairs(engine, micro_batch)
        before += scores.tolist()
        engine.set_gradient_accumulation_boundary(index == len(packed) - 1)
        engine.backward(loss_of(scores) * WORLD_SIZE, scale_wrt_gas=False)
    engine.step()
    with torch.no_grad():
        after = [row for micro_batch in packed for row in score_pairs(engine, micro_batch).tolist()]
    weights = {}
    for name, parameter in scorer.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    if rank == 0:
        torch.save(weights, folder / f"{list(CASES).index(case)}.pt")
    engine.destroy()
    return {"layout": scorer.layout, "reason": reason, "before": before, "after": after}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("zero3")
    return folder, run_ranks(WORLD_SIZE, train_on_ranks, str(folder), timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_plain_process(
    case: str, on_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, results = on_ranks
    layout = CASES[case][3]
    assert [result[case]["layout"] for result in results] == [layout] * WORLD_SIZE

    plain = policy_of(case)
    start = {f"policy.{name}": p.detach().clone() for name, p in plain.named_parameters()}
    rows = [[pair for batch in micro_batches(rank) for pair in batch] for rank in range(WORLD_SIZE)]
    before = [plain_scores(plain, own) for own in rows]
    sum((loss_of(scores) for scores in before), torch.tensor(0.0)).backward()
    torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE).step()
    plain.eval()
    with torch.no_grad():
        after = [plain_scores(plain, own) for own in rows]

    weights = torch.load(folder / f"{list(CASES).index(case)}.pt")
    changed = 0
    for plain_name, parameter in plain.named_parameters():
        name = f"policy.{plain_name}"
        theirs, ours = parameter.detach() - start[name], weights[name] - start[name]
        scale = max(theirs.abs().max().item(), LEARNING_RATE)
        rounding = 2e-7 * start[name].abs().max()  # of the weights that the changes are taken from
        assert (ours - theirs).abs().max() <= 1e-4 * scale + rounding, name
        changed += bool(theirs.any())
    assert changed >= 4 and weights.keys() == start.keys()
    for rank, result in enumerate(results):
        for ours, theirs in ((result[case]["before"], before), (result[case]["after"], after)):
            torch.testing.assert_close(torch.tensor(ours), theirs[rank], rtol=0, atol=2e-4)
