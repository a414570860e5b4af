"""The data gate: which pairs are dropped, and why, in the order of reasons.DROP_REASONS.

N rows of a split, after truncation unless said otherwise.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import (
    CODES,
    CONFLICT,
    DROP_REASONS,
    DUPLICATE,
    EMPTY,
    IDENTICAL,
    IDENTICAL_TRUNCATED,
    KEPT,
    LEFT_OUT,
    LOST_TEXT,
    OVERLAP,
    PROMPT_FILLS,
    Reason,
)
from dpo_dist.data.pairs import SPLITS, Split
from dpo_dist.data.screening.tokenized_rows import PairColumns
from dpo_dist.errors import DataError
from dpo_dist.reference.arrays import KeyArray
from dpo_dist.reference.pair_key import as_key_array

BoolArray = npt.NDArray[np.bool_]
LENGTH_MULTIPLE = 8
LENGTH_PERCENTILE = 99
FEW_ROWS, FEW = 3, 0.001  # so many rows, or this share, may lose text though on_lost_text is raise


def choose_max_length(
    columns: PairColumns, setting: int | str, model_limit: int | None
) -> tuple[int, str]:
    """Tokens of prompt + answer at most, and the arithmetic behind the number.

    `auto` is the 99th percentile of prompt + longer answer (nearest rank) over the training
    pairs that can be used, before truncation, rounded up to a multiple of 8 and at most what
    the model was made for. Raises DataError when a given number is above that.
    """
    if setting != "auto":
        length = int(setting)
        if model_limit is not None and length > model_limit:
            raise DataError(
                f"data.max_length {length} is above the model's {model_limit} positions",
                f"at most {model_limit}",
                "Lower it, or take a model with longer context.",
            )
        return length, f"{length:,} (data.max_length)"
    lengths = np.sort(columns.longest[columns.reasons == KEPT])
    if len(lengths) == 0:
        check_share(columns, "train", max_dropped=1.0)
    percentile = int(lengths[math.ceil(len(lengths) * LENGTH_PERCENTILE / 100) - 1])
    length = math.ceil(percentile / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    arithmetic = (
        f"p{LENGTH_PERCENTILE} of prompt + longer answer over {len(lengths):,} training pairs is "
        f"{percentile:,}, rounded up to a multiple of {LENGTH_MULTIPLE}"
    )
    if model_limit is not None and length > model_limit:
        return (
            model_limit,
            f"{model_limit:,} (auto: all positions of the model; {arithmetic} is {length:,})",
        )
    return length, f"{length:,} (auto: {arithmetic})"


def describe_split(tokenized: Mapping[Split, PairColumns], section: DataSection) -> str | None:
    """What eval_fraction did, in numbers; raises DataError when it left one side empty."""
    fraction = section.eval_fraction
    prompts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    rows: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for split, columns in tokenized.items():
        is_train = np.array([source.split == "train" for source in columns.sources])
        usable = is_train[columns.source] & (columns.reasons == KEPT)
        prompts[split] = len(np.unique(columns.prompt_keys[usable]))
        rows[split] = int(usable.sum())
    total = sum(prompts.values())
    if not fraction or (not total and "train" in tokenized):
        return None  # without any usable row the gate says why
    sides: tuple[tuple[Split, str, str], ...]
    sides = (("train", "all", "Lower"), ("eval", "none", "Raise"))
    for split, found, remedy in sides:
        if not prompts[split]:
            raise DataError(
                f"data.eval_fraction {fraction} holds out {found} of {total:,} prompts",
                "prompts on both sides",
                f"{remedy} it, or set data.eval instead.",
            )
    return (
        f"{prompts['eval']:,} of {total:,} prompts ({prompts['eval'] / total:.1%}) with "
        f"{rows['eval']:,} of {sum(rows.values()):,} pairs "
        f"(data.eval_fraction {fraction}, data.eval_seed {section.eval_seed})"
    )


def apply_gate(
    before: PairColumns,
    after: PairColumns,
    section: DataSection,
    split: str,
    max_length: int,
    trained_prompts: KeyArray | None = None,
) -> PairColumns:
    """`after` with the final reasons; `before` is the same not truncated.

    `trained_prompts` are the prompt keys of the kept training pairs when a held-out split is
    looked at. Raises DataError for a reason whose policy is raise, when more than
    `max_dropped` of the rows are dropped, and when nothing is left.
    """
    reasons = before.reasons.copy()
    policies = {r.name: getattr(section, r.policy) if r.policy else "drop" for r in DROP_REASONS}
    # without a single token there is nothing to condition on, or nothing to score
    lengths = (before.prompt_lengths, before.chosen_lengths, before.rejected_lengths)
    has_tokens = np.minimum.reduce(lengths) > 0
    for name in (LOST_TEXT, EMPTY):
        if policies[name] == "keep":
            reasons[(reasons == CODES[name]) & has_tokens] = KEPT

    def mark(name: str, found: BoolArray) -> None:
        if policies[name] != "keep":
            reasons[(reasons == KEPT) & found] = CODES[name]

    identical = after.pair_keys == after.swapped_keys
    mark(LEFT_OUT, np.isin(after.pair_keys, left_out_keys(section)))
    mark(PROMPT_FILLS, after.prompt_lengths >= max_length)
    mark(IDENTICAL, before.pair_keys == before.swapped_keys)
    mark(IDENTICAL_TRUNCATED, identical)
    alive = (reasons == KEPT) & ~identical
    mark(CONFLICT, alive & np.isin(after.swapped_keys, after.pair_keys[alive]))
    mark(DUPLICATE, _repeated(after.pair_keys, reasons == KEPT))
    if trained_prompts is not None:
        mark(OVERLAP, np.isin(after.prompt_keys, trained_prompts))
    gated = replace(after, reasons=reasons)
    for reason in DROP_REASONS:
        if policies[reason.name] == "raise":
            _check_none(gated, split, reason)
    check_share(gated, split, section.max_dropped)
    return gated


def left_out_keys(section: DataSection) -> KeyArray:
    """data.leave_out as keys are compared."""
    return as_key_array([bytes.fromhex(key) for key in section.leave_out])


def check_left_out(tokenized: Iterable[PairColumns], section: DataSection) -> None:
    """Raises DataError when a key of data.leave_out is no pair's: one that is mistyped."""
    found = [c.pair_keys[c.reasons == CODES[LEFT_OUT]] for c in tokenized]
    keys = left_out_keys(section)
    missing = np.flatnonzero(~np.isin(keys, np.concatenate(found)))
    if len(missing):
        raise DataError(
            f"data.leave_out: no pair has the key {section.leave_out[missing[0]]}",
            "keys of pairs of this tokenizer, template and data.max_length",
            "Correct it, or remove it.",
        )


def _repeated(keys: KeyArray, alive: BoolArray) -> BoolArray:
    """Rows whose key an earlier row among the living has."""
    rows = np.flatnonzero(alive)
    _, first = np.unique(keys[rows], return_index=True)
    repeated = alive.copy()
    repeated[rows[first]] = False
    return repeated


def _check_none(columns: PairColumns, split: str, reason: Reason) -> None:
    rows = np.flatnonzero(columns.reasons == CODES[reason.name])
    few = max(FEW_ROWS, int(FEW * len(columns))) if reason.name == LOST_TEXT else 0
    if len(rows) > few:
        where = _first_place(columns, reason)
        allowed = f"at most {few}" if few else "none"
        raise DataError(
            f"{len(rows)} of {len(columns)} {split} rows where {reason.meaning} (the first is "
            f"{where})",
            f"{allowed}, because data.{reason.policy} is raise",
            f"{reason.remedy} Or set data.{reason.policy}=drop.",
        )


def check_share(columns: PairColumns, split: str, max_dropped: float) -> None:
    """Raises DataError, naming the commonest reason, when too many rows are dropped or all."""
    total = len(columns)
    counts = np.bincount(columns.reasons, minlength=len(DROP_REASONS) + 1)
    num_dropped = total - int(counts[KEPT])
    if num_dropped < total and num_dropped <= max_dropped * total:
        return
    code = int(np.argmax(counts[1:])) + 1
    reason = DROP_REASONS[code - 1]
    where = _first_place(columns, reason)
    commonest = f"{int(counts[code])} because {reason.meaning}, the first is {where}"
    if num_dropped == total:
        raise DataError(
            f"no {split} pair is left of {total} rows ({commonest})",
            "at least one pair",
            reason.remedy,
        )
    raise DataError(
        f"{num_dropped} of {total} {split} rows are dropped ({commonest})",
        f"at most data.max_dropped = {max_dropped:.0%} of them",
        f"{reason.remedy} Or raise data.max_dropped.",
    )


def _first_place(columns: PairColumns, reason: Reason) -> str:
    """Where the first row with a reason lies, and what its template said or left out."""
    if details := columns.details.get(reason.name):
        return details[0]
    return columns.origin(int(np.flatnonzero(columns.reasons == CODES[reason.name])[0]))
