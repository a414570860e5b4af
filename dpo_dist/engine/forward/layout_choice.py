"""How a model is scored: in the packed layout where that is right, found out by trying.

`settle` is the self-check after loading. It picks the kernels of attention and experts, then the
layout. Some synthetic pairs are scored packed and plainly, one sequence at a time with the model's
own logits. Both must agree, and a rejected completion must not notice other tokens in the chosen.
This tells a model that mixes tokens outside of its attention (state-space, linear attention,
convolution) from one that does not, whatever its name. In the layout that was picked, a pair must
not notice how far another one reaches either.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.attention import Backend, PackedAttentionError
from dpo_dist.engine.forward.backend_choice import Experts, choose_backend, choose_experts
from dpo_dist.engine.forward.model_parts import backbone_of, base_of
from dpo_dist.engine.forward.packing import PackedPairs, PairIds, pack_pairs
from dpo_dist.engine.forward.padding import unpack_sequences
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, scorer_of
from dpo_dist.engine.forward.rotary import (
    asked_by_pair,
    length_bound_kinds,
    takes_any_position,
    watch_rotary,
)
from dpo_dist.errors import ConfigError, DPODistError

# Nats per token. Right tiny models of 18 families differ between layouts by up to 1e-6, 3e-3 and
# 2e-2; a rejected completion whose unseen tokens change moves by exactly 0 in all three dtypes.
_AGREEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NO_LEAK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_LONGEST_WINDOW = 512  # tokens; longer ones are not worth a probe that exceeds them
_FAR = 2**20  # positions; beyond the original context of any model


@dataclass(frozen=True)
class Settled:
    """How a scorer scores from now on, and why."""

    layout: Layout
    layout_reason: str
    backend: Backend
    backend_reason: str
    moved: float  # nats per token, by which a far neighbor moves a pair
    experts: tuple[Experts, str] | None = None  # how they are multiplied with, and why

    @property
    def found(self) -> dict[str, Any]:
        """What another `settle` of the same model, on the same device, may take as known."""
        return {
            "layout": self.layout, "layout_reason": self.layout_reason, "backend": self.backend,
            "moved_by_neighbors": self.moved, "experts": self.experts and self.experts[0],
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"layout: {self.layout} ({self.layout_reason}); "
            f"attention: {self.backend} ({self.backend_reason})"
            + ("" if self.experts is None else "; experts: {} ({})".format(*self.experts))
        )


def settle(
    scorer: PairScorer,
    *,
    layout: Literal["auto", "packed", "padded"] = "auto",
    attention: Literal["auto", "flash_attn", "torch", "sdpa"] = "auto",
    engine: nn.Module | None = None,
    device: torch.device | None = None,
    known: Mapping[str, Any] | None = None,
) -> Settled:
    """The self-check after loading: sets attention backend, experts' kernel and layout.

    `engine` is what the scorer runs in, such as DeepSpeed's, and `device` where it computes; by
    default the scorer itself and the place of its parameters. All ranks of a process group call it
    together and get the same layout. A padded layout that is asked for is taken unchecked. `known`
    is the `found` of an earlier check; with the same kernels it is taken over.

    Raises ConfigError for a layout or backend that this model cannot have here, and DPODistError
    when neither layout gives the log-probs of the model's own logits.
    """
    parameter = next(base_of(scorer.policy).parameters())
    place = parameter.device if device is None else device
    backend, backend_reason = choose_backend(scorer.policy, attention, place, parameter.dtype)
    scorer.backend = backend
    experts = choose_experts(scorer.policy, place)
    same = known and known.get("experts") == (experts and experts[0])
    if known and same and known.get("backend") == backend:
        scorer.layout, reason = known["layout"], known["layout_reason"]
        moved = known["moved_by_neighbors"]
        return Settled(scorer.layout, reason, backend, backend_reason, moved, experts)
    chosen: tuple[Layout, str] = ("padded", "requested")
    if layout != "padded":
        chosen = choose_layout(engine or scorer, place)
    scorer.layout, reason = chosen
    if layout not in ("auto", scorer.layout):
        raise ConfigError(
            f"model.layout is {layout}, but {reason}",
            "a layout in which the model scores right",
            "Set model.layout to auto.",
        )
    moved = check_neighbors(engine or scorer, place)
    return Settled(scorer.layout, reason, backend, backend_reason, moved, experts)


@torch.no_grad()
def choose_layout(
    model: nn.Module, device: torch.device, pairs: Sequence[PairIds] | None = None
) -> tuple[Layout, str]:
    """(layout, reason) for a PairScorer or a DeepSpeed engine around one, from scoring `pairs`.

    All ranks of a process group call it together and get the same answer. Dropout is off while it
    runs and the model's mode is put back after. Raises DPODistError when neither layout gives the
    log-probs of the model's own logits.
    """
    scorer = scorer_of(model)
    base = base_of(scorer.policy)
    dtype = next(base.parameters()).dtype
    training = model.training
    model.eval()
    try:
        tried = pairs or synthetic_pairs(base.config.get_text_config())
        packed = pack_pairs(tried, device, shared=False)
        plain = model(packed, "plain")
        fault = _known_obstacle(scorer.policy) or packed_fault(model, packed, plain, dtype)
        fault = next((one for one in collectives.gather(fault) if one), None)
        if fault is None:
            return "packed", "it agrees with plain forwards and does not leak"
        difference = max(collectives.gather(_per_token(model(packed, "padded") - plain, packed)))
    finally:
        model.train(training)
    if not difference <= _AGREEMENT[dtype]:
        raise DPODistError(
            f"{type(base).__name__} scored from its hidden states and output embedding is "
            f"{difference:.1e} nats per token away from its own logits",
            f"at most {_AGREEMENT[dtype]:.1e} in {dtype}",
            "The model changes its logits in a way that dpo-dist does not know: use another one.",
        )
    return "padded", fault


@torch.no_grad()
def check_neighbors(model: nn.Module, device: torch.device) -> float:
    """Scores two pairs in the settled layout and again with the last one at far positions.

    No sequence is long for it. Returns what that does to the first pair, in nats per token. All
    ranks call it together; raises ConfigError where a pair depends on how far others reach, or
    may do so where it cannot be tried.
    """
    scorer = scorer_of(model)
    base, training = base_of(scorer.policy), model.training
    kinds = ", ".join(length_bound_kinds(scorer.policy))
    short = synthetic_pairs(base.config.get_text_config())[-1]
    near = pack_pairs([short, short], device, shared=False)
    behind = torch.arange(near.num_tokens, device=device)[None] >= sum(near.part_lengths[0])
    far = replace(near, position_ids=near.position_ids + _FAR * behind)
    model.eval()
    try:
        scored, moved = model(near, scorer.layout), 0.0
        if takes_any_position(scorer.policy):
            change = (model(far, scorer.layout) - scored).abs() / near.lengths
            moved = max(collectives.gather(change[0].max().item()))
    finally:
        model.train(training)
    bound, fault = NO_LEAK[next(base.parameters()).dtype], None
    if not moved <= bound:
        fault = f"move by {moved:.1e} nats per token"
    if kinds and not asked_by_pair(watch_rotary(scorer.policy)):
        fault = "may change, and its code does not let that be tried"
    if fault is not None:
        raise ConfigError(
            f"{type(base).__name__} (rope_type: {kinds or 'default'}) takes its frequencies from "
            "the longest sequence of a forward: beside a longer pair the log-probs of another "
            + fault,
            "log-probs of a pair that are the same whatever stands beside it",
            "Use another model; or, if no pair is longer than its original context, set "
            "rope_parameters.rope_type (rope_scaling.type in older files) to default in its "
            "config.json.",
        )
    return moved


def synthetic_pairs(config: Any) -> list[PairIds]:
    """Two pairs of a repeated random phrase, long enough to exceed a small window.

    Repetition makes a trained model lean on what it attends to, so that a wrong mask shows. The
    chosen completion goes on with the phrase and the rejected one does not.
    """
    window = getattr(config, "sliding_window", None) or 0
    longest = 3 * (window if window <= _LONGEST_WINDOW else 0) // 2 + 48
    rng = random.Random(0)
    pairs: list[PairIds] = []
    for num_prompt, num_chosen, num_rejected in ((longest, 11, 17), (29, 19, 7)):
        phrase = [rng.randrange(config.vocab_size) for _ in range(12)]
        text = phrase * (num_prompt // 12 + 3)
        rejected = [rng.randrange(config.vocab_size) for _ in range(num_rejected)]
        pairs.append((text[:num_prompt], text[num_prompt : num_prompt + num_chosen], rejected))
    return pairs


def _known_obstacle(policy: nn.Module) -> str | None:
    """What the model says of itself that rules the packed layout out without a trial."""
    config = base_of(policy).config.get_text_config()
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"it attends in chunks of {config.attention_chunk_size} tokens"
    unknown = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    parameters = inspect.signature(type(backbone_of(policy)).forward).parameters.values()
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        return "its forward passes no keywords on to its attention"
    return None


def packed_fault(
    model: nn.Module, packed: PackedPairs, plain: Tensor, dtype: torch.dtype
) -> str | None:
    """What is wrong with the packed layout, or None."""
    try:
        scored = model(packed, "packed")
        difference = _per_token(scored - plain, packed)
        if not difference <= _AGREEMENT[dtype]:
            return f"packed it is {difference:.1e} nats per token away from plain forwards"
        other = model(_with_other_chosen(packed), "packed")
    except PackedAttentionError as error:
        return str(error)
    leak = ((other - scored).abs() / packed.lengths)[:, 1].max().item()
    if not leak <= NO_LEAK[dtype]:
        return f"packed, other tokens in chosen move rejected by {leak:.1e} nats per token"
    return None


def _per_token(difference: Tensor, packed: PackedPairs) -> float:
    """Largest difference of a completion's sum of log-probs, by its tokens; (B, 2) to nats."""
    per_token = difference.abs() / packed.lengths
    return float("inf") if per_token.isnan().any() else per_token.max().item()


def _with_other_chosen(packed: PackedPairs) -> PackedPairs:
    """The same pairs with each chosen completion made of the tokens of its rejected one."""
    sequences = [ids.tolist() for ids in unpack_sequences(packed)]
    pairs: list[PairIds] = []
    for group, (chosen, rejected) in enumerate(packed.pairs):
        num_prompt, num_chosen = packed.prompt_lengths[group], packed.answer_lengths[chosen]
        prompt, others = sequences[rejected][:num_prompt], sequences[rejected][num_prompt:]
        pairs.append((prompt, (others * num_chosen)[:num_chosen], others))
    return pack_pairs(pairs, packed.input_ids.device, shared=False)
