"""Generating answers from prompt token ids."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    """One answer a prompt, without special tokens; temperature 0 decodes greedily."""
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature  # pyright: ignore[reportArgumentType]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers
