"""Generating answers from prompt token ids: by a model of one's own, or by the policy in training.

W ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dpo_dist.engine import collectives
from dpo_dist.engine.rng import restore_rng, rng_states


@torch.no_grad()  # not inference_mode: parameters that ZeRO-3 gathers in it are lost to training
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    device: torch.device | None = None,
    in_step: bool = False,
) -> list[str]:
    """One answer a prompt, without special tokens; temperature 0 decodes greedily.

    With `in_step` every rank goes on as long as any does, as gathering parameters needs it.
    """
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature  # pyright: ignore[reportArgumentType]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device or next(model.parameters()).device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            synced_gpus=in_step,
            **sampling,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def answer_in_training(
    engine: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    device: torch.device,
    seed: int,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    """The answers of the policy inside a DeepSpeed engine around a PairScorer, on every rank.

    All ranks call together, and W prompts are answered at a time, one a rank. The policy stays
    partitioned. The generators of random numbers and the mode of the model are as before
    afterwards, so training goes on as if nothing had been asked. An answer depends on the
    prompt, its position and `seed`, not on the number of ranks.
    """
    scorer, states, training = engine.module, rng_states(), engine.training
    rank, world_size = collectives.place()
    answers: dict[int, str] = {}
    engine.eval()
    try:
        scorer.use_own_attention()  # the next scoring sets the packed one again
        for start in range(0, len(prompts), world_size):
            # a rank without a prompt left keeps the others company with the last one
            position = min(start + rank, len(prompts) - 1)
            torch.manual_seed(seed + position)
            (text,) = answer(
                scorer.policy, tokenizer, [prompts[position]], device=device,
                max_new_tokens=max_new_tokens, temperature=temperature,
                in_step=world_size > 1 and engine.zero_optimization_stage() == 3,
            )  # fmt: skip
            answers |= dict(collectives.gather((position, text)))
    finally:
        engine.train(training)
        restore_rng(states)
    return [answers[position] for position in range(len(prompts))]
