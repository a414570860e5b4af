"""The losses against TRL's own trainer, on the batch that its own dataloader makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from dpo_dist.objective.losses import (
    LOSSES,
    LOSSES_WITH_LABEL_SMOOTHING,
    PairLogps,
    hinge,
    ipo,
    sigmoid,
    sigmoid_norm,
)
from dpo_dist.objective.rewards import METRIC_NAMES, metric_means, metric_sums, reward_metrics

ROWS = [
    {"prompt": "a b c", "chosen": " d e", "rejected": " f"},
    {"prompt": "d", "chosen": " a", "rejected": " b b c a e f a"},
    {"prompt": "e f a b c d", "chosen": " f f e d c", "rejected": " a b c d e"},
    {"prompt": "b a", "chosen": " c a f e d b", "rejected": " e a"},
    {"prompt": "f e", "chosen": " c", "rejected": " d a"},
    {"prompt": "c c a", "chosen": " b f", "rejected": " a d e f"},
]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # log-ratios of the order of 1 between two seeds
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).float()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *"abcdef"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def trl_batch(tmp_path: Path, batch_size: int, **config: Any) -> tuple[DPOTrainer, dict[str, Any]]:
    """A real trainer with a policy unlike its reference, and its first training batch."""
    trainer = DPOTrainer(
        model=tiny_llama(seed=1),
        ref_model=tiny_llama(seed=2),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            **config,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def plain_logps(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:  # (B, 2)
    """Summed completion log-probs from one ordinary forward over prompt + completion rows."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    sums = (logps * batch["completion_mask"][:, 1:]).sum(1)
    return torch.stack(sums.chunk(2), dim=1)


def our_pair_logps(model: torch.nn.Module, batch: dict[str, Any]) -> PairLogps:
    with torch.no_grad():
        reference = plain_logps(tiny_llama(seed=2), batch)
    lengths = torch.stack(batch["completion_mask"].sum(1).chunk(2), dim=1)
    return PairLogps.from_columns(plain_logps(model, batch), reference, lengths)


def swapped(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in batch.items()}


def assert_same_loss_and_gradient(
    trl_loss: torch.Tensor, trl_model: torch.nn.Module, loss: torch.Tensor, model: torch.nn.Module
) -> None:
    trl_loss.backward()
    loss.backward()
    torch.testing.assert_close(loss, trl_loss, atol=1e-5, rtol=1e-5)
    ours = dict(model.named_parameters())
    assert ours["lm_head.weight"].grad is not None and ours["lm_head.weight"].grad.norm() > 1e-3
    for name, parameter in trl_model.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", list(LOSSES))
def test_equals_trl_in_value_gradient_and_metrics(name: str, beta: float, tmp_path: Path) -> None:
    trainer, batch = trl_batch(tmp_path, 6, loss_type=[name], beta=beta)
    assert isinstance(trainer.model, torch.nn.Module)
    model = tiny_llama(seed=1)
    trl_loss = trainer.compute_loss(trainer.model, batch)

    logps = our_pair_logps(model, batch)
    losses = LOSSES[name](logps, beta, 0.0)
    assert losses.shape == (6,)
    assert_same_loss_and_gradient(trl_loss, trainer.model, losses.mean(), model)

    means = metric_means(metric_sums(logps, losses, beta))
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    logged["loss"] = trl_loss.item()
    assert means == pytest.approx({key: logged[key] for key in METRIC_NAMES[1:]}, abs=1e-5)
    for key, values in reward_metrics(logps, beta).items():
        assert values.shape == (6,) and not values.requires_grad
        assert values.mean().item() == pytest.approx(logged[key], abs=1e-5)


def test_smoothed_sigmoid_equals_trl_on_one_pair(tmp_path: Path) -> None:
    # TRL's "sigmoid" drops label_smoothing; its "aot" sorts the batch, which leaves one pair
    # alone, and then smooths as cDPO does
    trainer, batch = trl_batch(tmp_path, 1, loss_type=["aot"], beta=0.5, label_smoothing=0.2)
    assert isinstance(trainer.model, torch.nn.Module)
    model = tiny_llama(seed=1)
    loss = sigmoid(our_pair_logps(model, batch), 0.5, 0.2).mean()
    trl_loss = trainer.compute_loss(trainer.model, batch)
    assert_same_loss_and_gradient(trl_loss, trainer.model, loss, model)


@pytest.mark.parametrize("name", LOSSES_WITH_LABEL_SMOOTHING)
def test_smoothing_mixes_in_trls_loss_of_the_swapped_pair(name: str, tmp_path: Path) -> None:
    trainer, batch = trl_batch(tmp_path, 6, loss_type=[name], beta=0.5)
    assert isinstance(trainer.model, torch.nn.Module)
    model = tiny_llama(seed=1)
    loss = LOSSES[name](our_pair_logps(model, batch), 0.5, 0.2).mean()
    right = trainer.compute_loss(trainer.model, batch)
    flipped = trainer.compute_loss(trainer.model, swapped(batch))
    assert_same_loss_and_gradient(0.8 * right + 0.2 * flipped, trainer.model, loss, model)


@pytest.mark.parametrize("loss", [hinge, ipo])
def test_a_loss_without_smoothing_refuses_it(loss: Any) -> None:
    with pytest.raises(AssertionError, match=r"label_smoothing is 0\.1"):
        loss(example_logps(), 0.1, 0.1)


def test_values_by_hand() -> None:
    # log-ratios 2 and -4 over 4 and 2 tokens: delta 6, per token 0.5 + 2
    logps = example_logps()
    log1p = torch.log1p(torch.exp(torch.tensor([-0.6])))
    torch.testing.assert_close(sigmoid(logps, 0.1, 0.0), log1p)
    torch.testing.assert_close(
        sigmoid_norm(logps, 5.0, 0.0), torch.log1p(torch.exp(torch.tensor([-12.5])))
    )
    torch.testing.assert_close(hinge(logps, 0.1, 0.0), torch.tensor([0.4]))
    torch.testing.assert_close(hinge(logps, 1.0, 0.0), torch.tensor([0.0]))
    torch.testing.assert_close(ipo(logps, 0.25, 0.0), torch.tensor([0.25]))


def test_an_empty_completion_divides_by_one() -> None:
    logps = example_logps()
    empty = copy.copy(logps)
    object.__setattr__(empty, "rejected_lengths", torch.tensor([0]))
    assert torch.isfinite(ipo(empty, 0.1, 0.0)).all()
    assert torch.isfinite(sigmoid_norm(empty, 0.1, 0.0)).all()


def test_columns_must_agree_in_shape() -> None:
    with pytest.raises(AssertionError, match=r"reference has shape \(3, 2\), policy \(2, 2\)"):
        PairLogps.from_columns(torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(2, 2))


def example_logps() -> PairLogps:
    return PairLogps.from_columns(
        policy=torch.tensor([[-8.0, -9.0]]),
        reference=torch.tensor([[-10.0, -5.0]]),
        lengths=torch.tensor([[4, 2]]),
    )
