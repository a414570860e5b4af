"""DPO in a plain PyTorch loop: the forward and the losses of this project without its stages.

    python examples/own_loop.py HuggingFaceTB/SmolLM2-135M-Instruct

docs/python.md describes what is imported from dpo_dist.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.engine.forward import PairIds, PairScorer, pack_pairs, score_pairs, settle
from dpo_dist.objective import Objective, PairLogps, pair_losses, reward_metrics

ROWS = [  # prompt, chosen, rejected
    ("Name a color.", " Blue.", " There are many colors, and blue is one of them."),
    ("What is 2 + 3?", " 5.", " This is a sum of two numbers, and the result is 5."),
    ("Where is Paris?", " In France.", " Paris is the name of a city, which is in France."),
    ("Who wrote Hamlet?", " Shakespeare.", " A playwright who was called Shakespeare wrote it."),
]
NUM_STEPS, LEARNING_RATE = 6, 1e-5


def token_ids(tokenizer: Any, prompt: str, chosen: str, rejected: str) -> PairIds:
    """Ids of a row; the model is to stop after an answer, so each ends in the end token."""
    end = str(tokenizer.eos_token)
    answers = [tokenizer(text + end, add_special_tokens=False) for text in (chosen, rejected)]
    return tokenizer(prompt).input_ids, answers[0].input_ids, answers[1].input_ids


def main(model_name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    policy = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device)
    scorer = PairScorer(policy)
    print(settle(scorer))

    packed = pack_pairs([token_ids(tokenizer, *row) for row in ROWS], device)
    with torch.no_grad():  # the reference is the policy before its first step
        reference = score_pairs(scorer, packed)

    objective = Objective(beta=0.1)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=LEARNING_RATE)
    for step in range(1, NUM_STEPS + 1):
        logps = PairLogps.from_columns(score_pairs(scorer, packed), reference, packed.lengths)
        loss = pair_losses(logps, objective).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards = {name: value.mean() for name, value in reward_metrics(logps, objective).items()}
        print(
            f"step {step}: loss {loss:.4f}, margin {rewards['rewards/margins']:.3f}, "
            f"accuracy {rewards['rewards/accuracies']:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
