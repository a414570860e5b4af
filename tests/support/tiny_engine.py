"""A tiny policy in a real DeepSpeed engine, for tests that run on ranks of their own."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpo_dist.config.training_section import TrainSection
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.engine.sharding.optimizers import make_optimizer

GLOBAL_BATCH = 6  # rows a step, divisible by 1, 2 and 3 ranks
SUB_GROUP_ELEMENTS = 20  # of a rank: several sub-groups, as in models of 10^9 parameters


class TinyPolicy(nn.Module):
    """A tied embedding, odd shapes, a buffer; with `adapter` only two small matrices train."""

    def __init__(self, adapter: bool, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.middle = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.arange(3.0))
        self.adapter: nn.Sequential | None = None
        if adapter:
            self.requires_grad_(False)
            self.adapter = nn.Sequential(nn.Linear(width, 3, bias=False), nn.Linear(3, width))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.embed(token_ids)) * self.scale + self.shift.sum()
        if self.adapter is not None:
            hidden = hidden + self.adapter(hidden)
        return self.head(torch.tanh(hidden)).float().log_softmax(-1)


class Scorer(nn.Module):
    """Gives parameters the `policy.` prefix that they have in training."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.policy(token_ids)[..., 1].sum()


def start_engine(
    stage: int,
    *,
    adapter: bool,
    dtype: str = "float32",
    universal: bool = False,
    width: int = 7,
    depth: int = 1,
    optimizer: str = "adamw",
) -> Any:
    """A fresh engine; the same weights on every call."""
    import deepspeed

    torch.manual_seed(0)
    scorer = Scorer(TinyPolicy(adapter, width, depth)).to(getattr(torch, dtype))
    train = TrainSection.model_validate(
        {"deepspeed": f"zero{stage}", "learning_rate": 1e-2, "weight_decay": 0.1}
        | {"optimizer": optimizer, "max_grad_norm": 0.0 if optimizer == "muon" else 1.0}
    )
    config = ds_config.training_config(train, dtype, dist.get_world_size(), universal=universal)
    if stage == 3:
        config["zero_optimization"] |= {"sub_group_size": SUB_GROUP_ELEMENTS * width // 7}
    # Not zero.start_training, whose schedules cost every rank of every test seconds of imports.
    engine, *_ = deepspeed.initialize(
        model=scorer,
        optimizer=make_optimizer(scorer, config, train),
        lr_scheduler=_decaying,
        config=config,
        dist_init_required=False,
    )
    return engine


def _decaying(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def train_step(engine: Any, step: int) -> float:
    """One optimizer step on this rank's share of the step's rows; the loss over all rows."""
    rows = torch.randint(13, (GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(step))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loss = -engine(rows[rank::world_size]) / GLOBAL_BATCH
    zero.backward(engine, loss, last=True, world_size=world_size)
    zero.update(engine)
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total)


def full_weights(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trainable parameters gathered from the live engine: (in the model's dtype, fp32 masters)."""
    import deepspeed

    weights, masters = {}, {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage():
            master = deepspeed.utils.safe_get_full_fp32_param(parameter)
            assert master is not None, name
            masters[name] = master.clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights, masters


def case_name(stage: int, dtype: str, adapter: bool) -> str:
    """Folder of one combination."""
    return f"stage{stage}-{dtype}-{'adapter' if adapter else 'full'}"


def checkpoints_of(folder: str | Path, case: str) -> Path:
    """The checkpoints folder of the run of one combination."""
    return Path(folder) / case / "checkpoints"
