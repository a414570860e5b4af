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

from dpo_dist.engine.distributed.sequence_parallel import Slice, Team
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

    The ranks of a `team` score the same pairs together, each on its slice of the tokens,
    or padded on its share of the sequences. All of them get all columns.

    `layout` and `backend` are set after loading, by `settle`. The model keeps the attention of the
    last layout it ran with, because a recomputed layer needs it again in backward; call
    `use_own_attention` before it generates. Raises ConfigError for a head that cannot be used.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        layout: Layout = "packed",
        backend: Backend = "sdpa",
        team: Team | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.head = CompletionHead(policy)
        self.layout: Layout = layout
        self.backend: Backend = backend
        self.team = team
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
        hidden, own, routers = (self._packed if layout == "packed" else self._padded)(packed)
        self.head.declare_parameters()
        targets = packed.targets if own is None else packed.targets[own]
        logps, log_sum_sq = self.head(hidden, targets, packed.terms.sum_sq)
        if self.team is None or own is None:
            return pair_columns(packed, logps, log_sum_sq, routers)
        # sums over the team's tokens of sums over one's own, where the others' count as zeros
        every = logps.new_zeros(packed.num_scored)
        logps = every.index_copy(0, own, logps)
        log_sum_sq = None if log_sum_sq is None else every.index_copy(0, own, log_sum_sq)
        return self.team.sum(pair_columns(packed, logps, log_sum_sq, routers))

    @property
    def shares_prompts(self) -> bool:
        """Whether pairs may share a prompt: not where frequencies depend on how long a pair is."""
        return not self._rotary

    @property
    def ranks_per_row(self) -> int:
        """Ranks that score the same pairs."""
        return 1 if self.team is None else self.team.size

    def use_own_attention(self) -> None:
        """Gives the policy the attention it was loaded with, until the next forward of this."""
        self._divide(None)
        self._use_attention(self._own_attention)

    def _packed(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(C, D) hidden states that predict the targets, which of the targets these are where ranks
        share the row, and the columns of the routers."""
        sizes = [sum(lengths) for lengths in packed.part_lengths]
        input_ids, position_ids = packed.input_ids, packed.position_ids
        part = self._slice(packed.num_tokens)
        if part is None:
            self._divide(Parts(1, sizes))
        else:
            self._divide(Parts(1, sizes, position_ids, part))
            input_ids, position_ids = (part.take(each, 1) for each in (input_ids, position_ids))
        output = backbone_of(self.policy)(
            input_ids=input_ids,
            position_ids=position_ids,
            # all of them: without a mask transformers reads the positions and waits for the device
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            packed_row=PackedRow.of(packed, self.backend, self.team),
            **self._router_kwargs(packed),
        )
        states = output.last_hidden_state[0]
        hidden, own = _scored(states, packed.score_positions, packed.score_places, part)
        if not packed.terms.num_experts:
            return hidden, own, None
        lengths = np.concatenate(packed.part_lengths)
        part_of = upload(
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), hidden.device
        )
        weights = torch.ones_like(part_of)
        if part is not None:
            part_of, weights = part.take(part_of, 0), part.is_there(hidden.device)
        sums = self._router_sums(output, weights, part_of, len(lengths))
        # each group's prompt is a part before its answers
        group_of = packed.group_of
        first = list(itertools.accumulate(packed.group_sizes, initial=0))
        parts = [
            (first[group_of[chosen]] + group_of[chosen],)
            + tuple(answer + group_of[answer] + 1 for answer in (chosen, rejected))
            for chosen, rejected in packed.pairs
        ]
        prompt, chosen, rejected = sums[upload(torch.tensor(parts), hidden.device)].unbind(1)
        return hidden, own, 2 * prompt + chosen + rejected

    def _padded(self, packed: PackedPairs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `_packed`."""
        padded = pad_pairs(packed)
        input_ids, mask, position_ids = padded.input_ids, padded.attention_mask, padded.position_ids
        num_sequences, width = input_ids.shape
        part = self._slice(num_sequences)
        if part is None:
            self._divide(Parts(0, packed.group_sizes))
        else:
            self._divide(Parts(0, packed.group_sizes, position_ids, part))
            input_ids, mask, position_ids = (
                part.take(each, 0) for each in (input_ids, mask, position_ids)
            )
        # as long as each sequence is, where the model would count on to the end of the padding
        positions = {"position_ids": position_ids} if self._rotary else {}
        output = backbone_of(self.policy)(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=False,
            **positions,
            **self._router_kwargs(packed),
        )
        states = output.last_hidden_state.flatten(0, 1)
        hidden, own = _scored(states, padded.score_positions, padded.score_places, part, width)
        if not packed.terms.num_experts:
            return hidden, own, None
        sequences = torch.arange(num_sequences, device=mask.device)
        if part is not None:
            sequences, mask = part.take(sequences, 0), mask * part.is_there(mask.device)[:, None]
        sequences = sequences.repeat_interleave(width)
        sums = self._router_sums(output, mask.flatten(), sequences, num_sequences)
        return hidden, own, sums[upload(torch.tensor(packed.pairs), hidden.device)].sum(1)

    def _slice(self, count: int) -> Slice | None:
        """Which of `count` tokens or sequences this rank computes, None where it has all."""
        return None if self.team is None else self.team.slice_of(count)

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


def _scored(
    states: Tensor, positions: Tensor, places: Tensor, part: Slice | None, width: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (own, D) at those of the C positions that lie in this rank's part, and which of
    the C these are; all of them, and None, without a part. A thing of it has `width` states.

    `places` are the positions on the host, so that nobody waits for the device to count them.
    """
    if part is None:
        return states[positions], None
    first, length = part.start * width, part.length * width
    own = ((places >= first) & (places < first + length)).nonzero().squeeze(1)
    return states[upload(places[own] - first, states.device)], upload(own, states.device)
