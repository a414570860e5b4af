"""The columns of `Terms` from the whole logits of padded rows, as plainly as they can be had."""

from typing import Any

import torch
from torch import Tensor

from dpo_dist.objective.pair_logps import PairLogps, Terms


def plain_columns(model: Any, batch: dict[str, Tensor], terms: Terms) -> Tensor:
    """(B, K) of the 2B rows prompt + chosen, then prompt + rejected: TRL's batch."""
    asked = {"output_router_logits": True} if terms.num_experts else {}
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **asked)
    distribution = output.logits[:, :-1].log_softmax(-1)  # (2B, L - 1, V)
    mask = batch["completion_mask"][:, 1:]
    logps = distribution.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    lengths = mask.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    weights = torch.where(mask.cumsum(1) > shared[:, None], terms.ld_alpha, 1.0) * mask
    parts = [_pairs((logps * weights).sum(1))]
    if terms.unweighted:
        parts.append(_pairs((logps * mask).sum(1)))
    if terms.prompt:
        before = batch["attention_mask"][:, 1:] - mask
        parts.append(_pairs((logps * before).sum(1))[:, :1])
    if terms.sum_sq:
        parts.append(_pairs(((2 * distribution).logsumexp(-1) * mask).sum(1)))
    if terms.num_experts:
        parts += _routers(output.router_logits, batch["attention_mask"], terms.num_experts)
    return torch.cat(parts, dim=1)


def plain_pair_logps(
    model: Any, reference_model: Any, batch: dict[str, Tensor], terms: Terms
) -> PairLogps:
    """What a loss may know about the pairs of TRL's batch."""
    with torch.no_grad():
        reference = plain_columns(reference_model, batch, Terms(ld_alpha=terms.ld_alpha))
    lengths = _pairs(batch["completion_mask"].sum(1))
    prompt_lengths = _pairs(batch["attention_mask"].sum(1))[:, 0] - lengths[:, 0]
    return PairLogps.from_columns(
        plain_columns(model, batch, terms), reference, lengths, terms, prompt_lengths=prompt_lengths
    )


def _pairs(rows: Tensor) -> Tensor:
    return torch.stack(rows.chunk(2), dim=1)


def _routers(router_logits: Any, attention_mask: Tensor, num_experts: int) -> list[Tensor]:
    """(B, E) choices and summed probabilities of two experts a token, over layers and tokens."""
    num_rows = len(attention_mask)
    counts = torch.zeros(num_rows, num_experts)
    probs = torch.zeros(num_rows, num_experts)
    for layer in router_logits:
        each = layer.float().softmax(-1).view(num_rows, -1, num_experts)
        chosen = torch.zeros_like(each).scatter_(2, each.topk(2).indices, 1.0)
        counts = counts + (chosen * attention_mask[..., None]).sum(1)
        probs = probs + (each * attention_mask[..., None]).sum(1)
    return [sum(part.chunk(2)) for part in (counts, probs)]  # pyright: ignore
