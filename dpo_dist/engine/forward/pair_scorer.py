"""The one forward: token ids in, sums of completion log-probs out.

Shapes: B pairs, T packed tokens, C completion tokens, D hidden.

The reference pass, training, evaluation, the checkpoint's probe and the check of the export all
score through `score_pairs`, so that the numbers they compare come from the same operations.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpo_dist.engine.forward.attention import (
    PACKED_ATTENTION,
    Backend,
    PackedAttentionError,
    PackedRow,
)
from dpo_dist.engine.forward.head import CompletionHead
from dpo_dist.engine.forward.model_parts import backbone_of, base_of
from dpo_dist.engine.forward.packing import PackedPairs, pad_pairs, unpack_sequences, upload
from dpo_dist.engine.forward.pair_sums import pair_columns, router_columns
from dpo_dist.engine.forward.rotary import Parts, watch_rotary

# packed: one row, prompts shared. padded: 2B sequences, for models that mix tokens outside of
# attention. plain: one sequence at a time and the model's own logits, to check the others against.
Layout = Literal["packed", "padded", "plain"]


def score_pairs(model: nn.Module, packed: PackedPairs, layout: Layout | None = None) -> Tensor:
    """(B, K) float32: summed log-probs of the chosen (0) and the rejected (1) completion.

    Further columns are those that `packed.terms` asks for; by default there are none, K = 2.
    `model` is a PairScorer or a DeepSpeed engine around one, scored in its settled layout unless
    another is given.
    """
    return model(packed, layout)


class PairScorer(nn.Module):
    """A causal LM, with or without a peft adapter, as a module that scores packed pairs.

    `layout` and `backend` are set after loading, by `settle`. The model keeps the attention of the
    last layout it ran with, because a recomputed layer needs it again in backward; call
    `use_own_attention` before it generates. Raises ConfigError for a head that cannot be used.
    """

    def __init__(
        self, policy: nn.Module, *, layout: Layout = "packed", backend: Backend = "sdpa"
    ) -> None:
        super().__init__()
        self.policy = policy
        self.head = CompletionHead(policy)
        self.layout: Layout = layout
        self.backend: Backend = backend
        self._rotary = watch_rotary(policy)
        self._own_attention: str = base_of(policy).get_correct_attn_implementation(None)
        self.train(policy.training)  # a policy in eval mode keeps its dropout off

    def forward(self, packed: PackedPairs, layout: Layout | None = None) -> Tensor:
        """(B, K) float32 columns of `packed.terms`, in `layout` or the settled one.

        Raises PackedAttentionError when the packed layout is asked of a model that cannot have it.
        """
        layout = layout or self.layout
        self._use_attention(PACKED_ATTENTION if layout == "packed" else self._own_attention)
        if layout == "plain":
            return pair_columns(packed, self._plain_logps(packed))
        hidden, routers = (self._packed if layout == "packed" else self._padded)(packed)
        self.head.declare_parameters()
        logps, log_sum_sq = self.head(hidden, packed.targets, packed.terms.sum_sq)
        return pair_columns(packed, logps, log_sum_sq, routers)

    def use_own_attention(self) -> None:
        """Gives the policy the attention it was loaded with, until the next forward of this."""
        self._divide(None)
        self._use_attention(self._own_attention)

    def _packed(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None]:
        """(C, D) hidden states that predict the targets, and the columns of the routers."""
        self._divide(Parts(1, packed.pair_sizes))
        output = backbone_of(self.policy)(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # all of them: without a mask transformers reads the positions and waits for the device
            attention_mask=torch.ones_like(packed.input_ids),
            use_cache=False,
            packed_row=PackedRow.of(packed, self.backend),
            **self._router_kwargs(packed),
        )
        hidden = output.last_hidden_state[0][packed.score_positions]
        if not packed.terms.num_experts:
            return hidden, None
        sizes = [packed.prompt_lengths, packed.chosen_lengths, packed.rejected_lengths]
        lengths = np.stack(sizes, axis=1).ravel()
        part = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
        # a prompt's token counts twice, as it would in a row with either completion
        weights = np.where(part % 3 == 0, np.float32(2), np.float32(1))
        rows = (upload(torch.from_numpy(each), hidden.device) for each in (weights, part // 3))
        return hidden, self._routers(output, packed, *rows)

    def _padded(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None]:
        """As `_packed`."""
        padded = pad_pairs(packed)
        self._divide(Parts(0, [2] * packed.num_pairs))
        # as long as each sequence is, where the model would count on to the end of the padding
        positions = {"position_ids": padded.position_ids} if self._rotary else {}
        output = backbone_of(self.policy)(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            use_cache=False,
            **positions,
            **self._router_kwargs(packed),
        )
        hidden = output.last_hidden_state.flatten(0, 1)[padded.score_positions]
        if not packed.terms.num_experts:
            return hidden, None
        mask = padded.attention_mask
        pair_of = torch.arange(len(mask), device=mask.device) // 2
        return hidden, self._routers(
            output, packed, mask.flatten().float(), pair_of.repeat_interleave(mask.shape[1])
        )

    def _router_kwargs(self, packed: PackedPairs) -> dict[str, bool]:
        return {"output_router_logits": True} if packed.terms.num_experts else {}

    def _routers(
        self, output: Any, packed: PackedPairs, weights: Tensor, pair_of: Tensor
    ) -> Tensor:
        """(B, 2 E) columns; weights and pair_of are of the rows of router logits."""
        top_k = base_of(self.policy).config.get_text_config().num_experts_per_tok
        return router_columns(output.router_logits, weights, pair_of, packed.num_pairs, top_k)

    def _plain_logps(self, packed: PackedPairs) -> Tensor:
        """(C,) log-probs of completions from the model's own logits, each sequence alone.

        It is as long as the other one of its pair, whose length may decide on its frequencies.
        """
        assert packed.terms.num_columns == 2, f"{packed.terms} has more than completions"
        self._divide(Parts(0, [1]))
        sequences, logps = unpack_sequences(packed), []
        scored = packed.scored_offsets.split(packed.completion_lengths)
        for index, (ids, offsets) in enumerate(zip(sequences, scored, strict=True)):
            behind = max(0, len(sequences[index ^ 1]) - len(ids))
            row = torch.cat((ids, ids[-1:].expand(behind)))
            logits = self.policy(input_ids=row[None], use_cache=False).logits[0]
            places = upload(packed.prompt_lengths[index // 2] + offsets, ids.device)
            all_logps = logits[places - 1].float().log_softmax(-1)
            logps.append(all_logps.gather(1, ids[places, None]).squeeze(1))
        return torch.cat(logps)

    def _divide(self, parts: Parts | None) -> None:
        """Tells the rotary embeddings what is a pair; a recomputed layer may ask again."""
        for module in self._rotary:
            module.pair_parts = parts

    def _use_attention(self, name: str) -> None:
        base = base_of(self.policy)
        if base.config._attn_implementation == name:
            return
        if not base._can_set_attn_implementation():
            if name == PACKED_ATTENTION:
                raise PackedAttentionError(f"{type(base).__name__} has an attention of its own")
            return
        base.set_attn_implementation(name)
