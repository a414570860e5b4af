"""What tests against TRL share: rows, a tiny model, one comparison of loss and gradient."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from dpo_dist.objective.objective import Objective

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


def names_of(objective: Objective) -> dict[str, Any]:
    """The same settings as TRL names them."""
    names, weights = zip(*objective.losses, strict=True)
    return {
        "loss_type": list(names),
        "loss_weights": list(weights),
        "ld_alpha": None if objective.ld_alpha == 1 else objective.ld_alpha,
        **{
            key: getattr(objective, key)
            for key in (
                "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
                "discopop_tau", "use_weighting",
            )
        },
    }  # fmt: skip
