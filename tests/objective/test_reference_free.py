"""simpo and orpo against TRL's experimental trainers, the routers against its DPOTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.oracles.against_trl import (
    ROWS,
    assert_same_loss_and_gradient,
    names_of,
    tiny_llama,
    tiny_tokenizer,
)
from support.oracles.plain_columns import plain_pair_logps
from transformers import MixtralConfig, MixtralForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from dpo_dist.objective.mixture import pair_losses
from dpo_dist.objective.objective import Objective
from dpo_dist.objective.rewards import metric_means, metric_names, metric_sums

PLAIN: dict[str, Any] = {
    "per_device_train_batch_size": len(ROWS),
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "activation_checkpointing": False,
}


def as_dpo_batch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Chosen rows above rejected ones, as DPOTrainer has them, from a CPO or ORPO batch."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def both(name: str, fill: int) -> torch.Tensor:
        rows = [batch[f"{side}_{name}"] for side in ("chosen", "rejected")]
        padded = [torch.nn.functional.pad(r, (0, width - r.shape[1]), value=fill) for r in rows]
        return torch.cat(padded)

    labels = both("labels", -100)
    return {
        "input_ids": both("input_ids", 0),
        "attention_mask": both("attention_mask", 0),
        "completion_mask": (labels != -100).long(),
    }


def assert_equals(trainer: Any, objective: Objective) -> None:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trl_loss, trl_metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    model = tiny_llama(seed=1)
    logps = plain_pair_logps(model, tiny_llama(seed=2), as_dpo_batch(batch), objective.terms())
    losses = pair_losses(logps, objective)
    assert_same_loss_and_gradient(trl_loss, trainer.model, losses.mean(), model)
    names = metric_names(objective)
    means = metric_means(metric_sums(logps, losses, objective), names)
    trl_metrics["loss"] = trl_loss.item()
    assert means == pytest.approx({name: trl_metrics[name] for name in names[1:]}, abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        ((("simpo", 1.0),), {"beta": 2.0, "simpo_gamma": 1.0}),
        ((("simpo", 1.0),), {"beta": 0.5, "label_smoothing": 0.1}),
        ((("simpo", 1.0), ("sft", 0.7)), {"beta": 2.0}),
    ],
)
def test_simpo_equals_trl(
    losses: tuple[tuple[str, float], ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = CPOTrainer(
        model=tiny_llama(seed=1),
        args=CPOConfig(
            output_dir=str(tmp_path),
            loss_type="simpo",
            cpo_alpha=dict(losses).get("sft", 0.0),
            **PLAIN,
            **settings,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    assert_equals(trainer, Objective(losses=losses, reference_free=True, **settings))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_equals_trl(beta: float, tmp_path: Path) -> None:
    trainer = ORPOTrainer(
        model=tiny_llama(seed=1),
        args=ORPOConfig(output_dir=str(tmp_path), beta=beta, **PLAIN),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    assert_equals(trainer, Objective(losses=(("orpo", 1.0),), beta=beta, reference_free=True))


def tiny_mixtral(seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return MixtralForCausalLM(config).float()


def test_the_routers_balance_equals_trl(tmp_path: Path) -> None:
    objective = Objective(router_aux_loss_coef=0.5)
    trainer = DPOTrainer(
        model=tiny_mixtral(seed=1),
        ref_model=tiny_mixtral(seed=2),
        args=DPOConfig(
            output_dir=str(tmp_path), router_aux_loss_coef=0.5, **PLAIN, **names_of(objective)
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert isinstance(trainer.model, torch.nn.Module)
    trl_loss = trainer.compute_loss(trainer.model, batch)
    model = tiny_mixtral(seed=1)
    logps = plain_pair_logps(model, tiny_mixtral(seed=2), batch, objective.terms(num_experts=4))
    losses = pair_losses(logps, objective)
    assert_same_loss_and_gradient(trl_loss, trainer.model, losses.mean(), model)
    means = metric_means(metric_sums(logps, losses, objective), metric_names(objective))
    assert means["aux_loss"] == pytest.approx(trainer._metrics["train"]["aux_loss"][-1], abs=1e-5)
