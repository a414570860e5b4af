"""Generating answers from prompt token ids: by a model of one's own, or by the policy in training.

W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_dist.config.output_section import GenerateSection
from dpo_dist.data.tokens.render import end_of_turn
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.rng import restore_rng, rng_states
from dpo_dist.watch.heartbeat import beat


@dataclass(frozen=True)
class Sampling:
    """How long an answer may be, and how its tokens are drawn; temperature 0 decodes greedily."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None  # None: as the model's generation config

    @classmethod
    def of(cls, section: GenerateSection) -> "Sampling":
        """That of the run config."""
        return cls(section.max_new_tokens, section.temperature, section.top_p)

    def options(self) -> dict[str, Any]:
        """As transformers' `generate` takes them."""
        drawn: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            drawn["temperature"] = self.temperature
            drawn |= {} if self.top_p is None else {"top_p": self.top_p}
        return drawn | {"max_new_tokens": self.max_new_tokens}


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
    sampling: Sampling,
    *,
    batch_size: int = 1,
    device: torch.device | None = None,
    **options: Any,
) -> list[Answer]:
    """One answer a prompt, `batch_size` at a time, each batch padded on the left behind a mask.

    `device` is where the prompts go, by default to the model's parameters. Further options are
    those of transformers' `generate`, such as a `streamer` or `stopping_criteria`.
    """
    stops = stop_ids(model, tokenizer)
    options.setdefault("stopping_criteria", stop_when(lambda: False))
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
            pad_token_id=pad,
            eos_token_id=stops or None,
            **sampling.options(),
            **options,
        )
        longest = sampling.max_new_tokens
        answers += [_answer(tokenizer, ids[width:], stops, longest) for ids in output]
    return answers


def answer_in_training(
    engine: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    device: torch.device,
    seed: int,
) -> list[str]:
    """The answers of the policy inside a DeepSpeed engine around a PairScorer, on every rank.

    All ranks call together, and W prompts are answered at a time, one a rank. The policy stays
    partitioned. The generators of random numbers and the mode of the model are as before
    afterward, so training goes on as if nothing had been asked. An answer depends on the
    prompt, its position and `seed`, not on the number of ranks.
    """
    scorer, states, training = engine.module, rng_states(), engine.training
    rank, world_size = collectives.place()
    # gathering parameters needs every rank to go on as long as any does
    together = world_size > 1 and engine.zero_optimization_stage() == 3
    answers: dict[int, str] = {}
    engine.eval()
    try:
        scorer.use_own_attention()  # the next scoring sets the packed one again
        for start in range(0, len(prompts), world_size):
            # a rank without a prompt left keeps the others company with the last one
            position = min(start + rank, len(prompts) - 1)
            torch.manual_seed(seed + position)
            prompt = prompts[position]
            (own,) = answer(
                scorer.policy, tokenizer, [prompt], sampling, device=device, synced_gpus=together
            )
            answers |= dict(collectives.gather((position, own.text)))
    finally:
        engine.train(training)
        restore_rng(states)
    return [answers[position] for position in range(len(prompts))]


def stop_when(asked: Callable[[], bool]) -> Any:
    """Stopping criteria for `answer` that ask after every token whether to end."""
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([_Asks(asked)])


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, the tokenizer's EOS, and
    what its chat template writes behind an answer.

    A base model that was trained with a chat template ends its turns in the latter two, which its
    generation config need not know.
    """
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    found = {*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)}
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
    """A stopping criterion of transformers: ends all rows when the answer is yes."""

    asked: Callable[[], bool]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        beat()
        return torch.full((len(input_ids),), self.asked(), device=input_ids.device)
