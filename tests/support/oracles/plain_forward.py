"""What tests of the forward compare it with: a model's own logits, one sequence at a time."""

import random
from typing import Any

import peft
import torch
from support.tiny_models import tiny_model
from torch import Tensor, nn

from dpo_dist.engine.forward.packing import PairIds

PACKED = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2",
    "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "qwen2_moe", "granite", "cohere", "phi",
    "hyperclovax", "gpt_oss",
)  # fmt: skip
PADDED = ("mamba", "falcon_h1", "lfm2", "recurrent_gemma", "bloom", "stablelm", "llama4")


def pairs() -> list[PairIds]:
    """Prompts longer and shorter than the models' window of 7, completions down to one token.

    Two completions have tokens in their middle that are read and not scored.
    """
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 128) for _ in range(count)]

    def read(completion: list[int], *offsets: int) -> list[int]:
        return [~token if at in offsets else token for at, token in enumerate(completion)]

    return [
        (ids(21), ids(9), read(ids(14), 2, 3, 4, 5, 8)),
        (ids(4), read(ids(12), 4, 5, 6, 7, 8, 11), ids(1)),
        (ids(1), ids(2), ids(10)),
    ]


def plain_scores(model: nn.Module, rows: list[PairIds]) -> Tensor:
    """(B, 2) from the model's own logits, one sequence at a time."""

    def logp(prompt: Any, completion: Any) -> Tensor:
        scored = torch.tensor([token >= 0 for token in completion])
        ids = torch.tensor([[*prompt, *(t if t >= 0 else ~t for t in completion)]])
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0][scored].sum()

    return torch.stack([torch.stack([logp(prompt, ids) for ids in both]) for prompt, *both in rows])


def adapted(family: str = "llama", **settings: Any) -> Any:
    """A peft policy whose adapter is not at its neutral start."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, **{"target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    )
    policy = peft.get_peft_model(tiny_model(family), config).eval()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return policy
