"""Rotary embeddings that are asked for one pair at a time, so that no pair changes another.

transformers takes the frequencies of `longrope` and `dynamic` from the largest position of the
whole forward, and `dynamic` keeps them for the next one. Here the longer of a pair's two sequences
decides for both, as in a padded batch of this pair alone. Kinds whose frequencies are set at load
are left as they are; every other one, also of a model's own code, is asked by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_dist.engine.distributed.sequence_parallel import Slice
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.model_files import rope


class Parts(NamedTuple):
    """How position ids divide into pairs: `sizes` along dimension `dim`.

    Where the model is asked for a slice only, `whole` has all of them, because a pair's frequencies
    depend on all of it.
    """

    dim: int
    sizes: Sequence[int]
    whole: Tensor | None = None
    own: Slice | None = None


def takes_any_position(policy: nn.Module) -> bool:
    """Whether the model surely computes the embedding of whatever position it is given.

    A model's own code may look one up instead, in a table that ends.
    """
    modules = [module for module in policy.modules() if _is_rotary(module)]
    return bool(modules) and all(
        type(module).__module__.startswith("transformers.") or asked_by_pair([module])
        for module in modules
    )


def asked_by_pair(modules: Sequence[nn.Module]) -> bool:
    """Whether these have been watched, and asked in a way that divides into pairs."""
    return bool(modules) and all(getattr(module, "asked_by_pair", False) for module in modules)


def length_bound_kinds(policy: nn.Module) -> list[str]:
    """The kinds of rotary embedding in the model's config that may depend on the length."""
    return rope.length_bound_kinds(vars(base_of(policy).config.get_text_config()))


def watch_rotary(policy: nn.Module) -> list[Any]:
    """The embeddings that may depend on the length, from now on divided by their `pair_parts`.

    None, as at first, leaves one as transformers has it, for generation. `asked_by_pair` says
    that it was divided: a model's own code may embed positions where no call shows it.
    """
    if not length_bound_kinds(policy):
        return []
    modules: list[Any] = [module for module in policy.modules() if _is_rotary(module)]
    for module in modules:
        if not hasattr(module, "pair_parts"):  # another scorer may have been here
            module.pair_parts, module.asked_by_pair = None, False
            module.register_forward_hook(_by_pair, with_kwargs=True)
    return modules


def _is_rotary(module: nn.Module) -> bool:
    return hasattr(module, "inv_freq") or "rotary" in type(module).__name__.lower()


def _by_pair(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the output as of every pair alone, or None to leave it as it is."""
    given = (*args, *kwargs.values())
    ids = next((a for a in given if isinstance(a, Tensor) and not a.is_floating_point()), None)
    if module.pair_parts is None or ids is None:
        return None
    dim, sizes, whole, own = module.pair_parts
    if ids.dim() != 2 or ids.shape[dim] != (sum(sizes) if own is None else own.length):
        return None
    positions_of_all = ids if whole is None else whole

    def at(positions: Tensor) -> tuple[Tensor, ...]:
        embedded = module.forward(
            *(positions if arg is ids else arg for arg in args),
            **{key: positions if arg is ids else arg for key, arg in kwargs.items()},
        )
        return (embedded,) if isinstance(embedded, Tensor) else embedded

    start, pieces = ids.new_zeros(1, 1), []
    for piece in positions_of_all.split(list(sizes), dim):
        at(start)  # `dynamic` forgets a long forward at a short one only
        pieces.append(at(piece))
    at(start)
    module.asked_by_pair = True
    joined = tuple(torch.cat(each, dim) for each in zip(*pieces, strict=True))
    if own is not None:
        joined = tuple(own.take(each, dim) for each in joined)
    return joined[0] if isinstance(output, Tensor) else joined
