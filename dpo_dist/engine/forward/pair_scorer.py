"""The one forward: token ids in, sums of completion log-probs out.

Shapes: B pairs of G prompts with A answers, T packed tokens, C scored tokens, D hidden.

The reference pass, training, evaluation, the checkpoint's probe and the check of the export all
score through `score_pairs`, so that the numbers they compare come from the same operations.
"""

from __future__ import annotations

import itertools
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
from dpo_dist.engine.forward.model_parts import CompletionHead, backbone_of, base_of
from dpo_dist.engine.forward.packing import PackedPairs, upload
from dpo_dist.engine.forward.padding import pad_pairs, unpack_sequences
from dpo_dist.engine.forward.pair_sums import pair_columns, router_sums
from dpo_dist.engine.forward.rotary import Parts, watch_rotary

# packed: one row, prompts shared. padded: a sequence an answer, for models that mix tokens outside
# of attention. plain: one sequence at a time and the model's own logits, to check the others by.
Layout = Literal["packed", "padded", "plain"]


def score_pairs(model: nn.Module, packed: PackedPairs, layout: Layout | None = None) -> Tensor:
    """(B, K) float32: summed log-probs of the chosen (0) and the rejected (1) completion.

    Further columns are those that `packed.terms` asks for; by default there are none, K = 2.
    `model` is a PairScorer or a DeepSpeed engine around one, scored in its settled layout unless
    another is given.
    """
    return model(packed, layout)


def scorer_of(model: nn.Module) -> PairScorer:
    """The PairScorer that a DeepSpeed engine trains, or the model itself if it is one."""
    scorer = model if isinstance(model, PairScorer) else model.module
    assert isinstance(scorer, PairScorer), type(scorer)
    return scorer


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
        assert self.shares_prompts or not packed.is_merged, (
            "found pairs that share a prompt, expected each alone, because its length decides on "
            "the frequencies of this model: pack_pairs(..., shared=False)"
        )
        layout = layout or self.layout
        self._use_attention(PACKED_ATTENTION if layout == "packed" else self._own_attention)
        if layout == "plain":
            return pair_columns(packed, self._plain_logps(packed))
        hidden, routers = (self._packed if layout == "packed" else self._padded)(packed)
        self.head.declare_parameters()
        logps, log_sum_sq = self.head(hidden, packed.targets, packed.terms.sum_sq)
        return pair_columns(packed, logps, log_sum_sq, routers)

    @property
    def shares_prompts(self) -> bool:
        """Whether pairs may share a prompt: not where frequencies depend on how long a pair is."""
        return not self._rotary

    def use_own_attention(self) -> None:
        """Gives the policy the attention it was loaded with, until the next forward of this."""
        self._divide(None)
        self._use_attention(self._own_attention)

    def _packed(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None]:
        """(C, D) hidden states that predict the targets, and the columns of the routers."""
        self._divide(Parts(1, [sum(lengths) for lengths in packed.part_lengths]))
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
        lengths = np.concatenate(packed.part_lengths)
        part_of = upload(
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), hidden.device
        )
        sums = self._router_sums(output, torch.ones_like(part_of), part_of, len(lengths))
        # each group's prompt is a part before its answers
        group_of = packed.group_of
        first = list(itertools.accumulate(packed.group_sizes, initial=0))
        parts = [
            (first[group_of[chosen]] + group_of[chosen],)
            + tuple(answer + group_of[answer] + 1 for answer in (chosen, rejected))
            for chosen, rejected in packed.pairs
        ]
        prompt, chosen, rejected = sums[upload(torch.tensor(parts), hidden.device)].unbind(1)
        return hidden, 2 * prompt + chosen + rejected

    def _padded(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None]:
        """As `_packed`."""
        padded = pad_pairs(packed)
        self._divide(Parts(0, packed.group_sizes))
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
        sequences = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.shape[1])
        sums = self._router_sums(output, mask.flatten(), sequences, len(mask))
        return hidden, sums[upload(torch.tensor(packed.pairs), hidden.device)].sum(1)

    def _router_kwargs(self, packed: PackedPairs) -> dict[str, bool]:
        return {"output_router_logits": True} if packed.terms.num_experts else {}

    def _router_sums(self, output: Any, weights: Tensor, part_of: Tensor, num_parts: int) -> Tensor:
        """(parts, 2 E); weights and part_of are of the rows of router logits."""
        top_k = base_of(self.policy).config.get_text_config().num_experts_per_tok
        return router_sums(output.router_logits, weights.float(), part_of, num_parts, top_k)

    def _plain_logps(self, packed: PackedPairs) -> Tensor:
        """(C,) log-probs of answers from the model's own logits, each sequence alone.

        It is as long as the longest of its group, whose length may decide on its frequencies.
        """
        assert packed.terms.num_columns == 2, f"{packed.terms} has more than completions"
        self._divide(Parts(0, [1]))
        sequences, logps = unpack_sequences(packed), []
        scored = packed.scored_offsets.split(packed.scored_lengths)
        longest = [prompt + max(answers) for prompt, *answers in packed.part_lengths]
        for ids, offsets, group in zip(sequences, scored, packed.group_of, strict=True):
            row = torch.cat((ids, ids[-1:].expand(longest[group] - len(ids))))
            logits = self.policy(input_ids=row[None], use_cache=False).logits[0]
            places = upload(packed.prompt_lengths[group] + offsets, ids.device)
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
