"""Generating answers from prompt token ids: by a model of one's own, or by the policy in training.

W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import restore_rng, rng_states


@dataclass(frozen=True)
class Answer:
    """An answer's text without special tokens; `num_tokens` counts the end token, if it came."""

    text: str
    num_tokens: int
    cut: bool  # stopped at max_new_tokens


@torch.no_grad()  # not inference_mode: parameters that ZeRO-3 gathers in it are lost to training
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None = None,
    batch_size: int = 1,
    streamer: Any = None,
    stop_if: Callable[[], bool] = lambda: False,
    device: torch.device | None = None,
    in_step: bool = False,
) -> list[Answer]:
    """One answer a prompt, `batch_size` at a time; temperature 0 decodes greedily.

    A batch is padded on the left, hidden by the attention mask. A `streamer` of transformers gets
    the tokens as they come, of one prompt at a time. `stop_if` is asked after every token.
    With `in_step` every rank goes on as long as any does, as gathering parameters needs it.
    """
    from transformers import StoppingCriteriaList

    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = device or next(model.parameters()).device
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        rows = [[pad or 0] * (width - len(ids)) + list(ids) for ids in batch]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=stops or None,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Asks(stop_if)]),
            synced_gpus=in_step,
            **sampling,
        )
        answers += [_answer(tokenizer, ids[width:], stops, max_new_tokens) for ids in output]
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
    top_p: float | None = None,
) -> list[str]:
    """The answers of the policy inside a DeepSpeed engine around a PairScorer, on every rank.

    All ranks call together, and W prompts are answered at a time, one a rank. The policy stays
    partitioned. The generators of random numbers and the mode of the model are as before
    afterward, so training goes on as if nothing had been asked. An answer depends on the
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
            (own,) = answer(
                scorer.policy, tokenizer, [prompts[position]], device=device,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                in_step=world_size > 1 and engine.zero_optimization_stage() == 3,
            )  # fmt: skip
            answers |= dict(collectives.gather((position, own.text)))
    finally:
        engine.train(training)
        restore_rng(states)
    return [answers[position] for position in range(len(prompts))]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's EOS.

    A base model that was trained with a chat template ends its turns in the tokenizer's, which
    its generation config need not know.
    """
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)


def context_length(model: Any) -> int | None:
    """Tokens of prompt and answer together that the model has positions for, if it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _answer(tokenizer: Any, ids: torch.Tensor, stops: list[int], max_new_tokens: int) -> Answer:
    """Cuts a row of a batch before its end token: what follows is padding."""
    tokens = ids.tolist()
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    if end is not None:
        return Answer(text, end + 1, cut=False)
    return Answer(text, len(tokens), cut=len(tokens) >= max_new_tokens)


@dataclass(frozen=True)
class _Asks:
    """A stopping criterion of transformers: ends all rows when `stop_if` says so."""

    stop_if: Callable[[], bool]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop_if(), device=input_ids.device)
