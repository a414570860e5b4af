"""The one forward: token ids in, sums of completion log-probs out.

Shapes: B pairs, T packed tokens, C completion tokens, D hidden.

The reference pass, training, evaluation, the checkpoint's probe and the check of the export all
score through `score_pairs`, so that the numbers they compare come from the same operations.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dpo_dist.engine.attention import (
    PACKED_ATTENTION,
    Backend,
    PackedAttentionError,
    PackedRow,
)
from dpo_dist.engine.head import CompletionHead
from dpo_dist.engine.model_parts import backbone_of, base_of
from dpo_dist.engine.packing import PackedPairs, pad_pairs, unpack_sequences

# packed: one row, prompts shared. padded: 2B sequences, for models that mix tokens outside of
# attention. plain: one sequence at a time and the model's own logits, to check the others against.
Layout = Literal["packed", "padded", "plain"]


def score_pairs(model: nn.Module, packed: PackedPairs) -> Tensor:
    """(B, 2) float32: summed log-probs of the chosen (0) and the rejected (1) completion.

    `model` is a PairScorer or a DeepSpeed engine around one.
    """
    return model(packed)


class PairScorer(nn.Module):
    """A causal LM, with or without a peft adapter, as a module that scores packed pairs.

    `layout` and `backend` are settled after loading, by `choose_layout` and `choose_backend`. The
    model keeps the attention of the last layout it ran with, because a recomputed layer needs it
    again in backward; generate from a model that was loaded afresh.
    """

    def __init__(
        self, policy: nn.Module, *, layout: Layout = "packed", backend: Backend = "sdpa"
    ) -> None:
        super().__init__()
        self.policy = policy
        self.head = CompletionHead(policy)
        self.layout: Layout = layout
        self.backend: Backend = backend
        self._own_attention: str = base_of(policy).get_correct_attn_implementation(None)

    def forward(self, packed: PackedPairs, layout: Layout | None = None) -> Tensor:
        """(B, 2) float32 sums of completion log-probs, in `layout` or the settled one.

        Raises PackedAttentionError when the packed layout is asked of a model that cannot have it.
        """
        layout = layout or self.layout
        self._use_attention(PACKED_ATTENTION if layout == "packed" else self._own_attention)
        if layout == "plain":
            logps = self._plain_logps(packed)
        else:
            hidden = (
                self._packed_hidden(packed) if layout == "packed" else self._padded_hidden(packed)
            )
            self.head.declare_parameters()
            logps = self.head(hidden, packed.targets)
        sums = [completion.sum() for completion in logps.split(packed.completion_lengths)]
        return torch.stack(sums).view(-1, 2)

    def _packed_hidden(self, packed: PackedPairs) -> Tensor:
        """(C, D) hidden states that predict the targets."""
        output = backbone_of(self.policy)(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            packed_row=PackedRow.of(packed, self.backend),
        )
        return output.last_hidden_state[0][packed.score_positions]

    def _padded_hidden(self, packed: PackedPairs) -> Tensor:
        """(C, D) hidden states that predict the targets."""
        padded = pad_pairs(packed)
        output = backbone_of(self.policy)(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1)[padded.score_positions]

    def _plain_logps(self, packed: PackedPairs) -> Tensor:
        """(C,) log-probs from the model's own logits, each sequence alone."""
        logps: list[Tensor] = []
        for ids, length in zip(unpack_sequences(packed), packed.completion_lengths, strict=True):
            logits = self.policy(input_ids=ids[None], use_cache=False).logits[0, -length - 1 : -1]
            all_logps = logits.float().log_softmax(-1)
            logps.append(all_logps.gather(1, ids[-length:, None]).squeeze(1))
        return torch.cat(logps)

    def _use_attention(self, name: str) -> None:
        base = base_of(self.policy)
        if base.config._attn_implementation == name:
            return
        if not base._can_set_attn_implementation():
            if name == PACKED_ATTENTION:
                raise PackedAttentionError(f"{type(base).__name__} has an attention of its own")
            return
        base.set_attn_implementation(name)
