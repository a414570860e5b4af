"""The data gate: max_length, each reason and policy, their order, and what an error says."""

from pathlib import Path

import numpy as np
import pytest
from support.token_rows import TokenRow, columns_of

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import DROP_REASONS, KEPT
from dpo_dist.data.screening.drops import apply_gate, choose_max_length
from dpo_dist.data.screening.tokenized_rows import KeyArray, PairColumns, truncate
from dpo_dist.errors import DataError

GOOD: TokenRow = ([1, 2], [3], [4])


def settings(**keys: object) -> DataSection:
    return DataSection.model_validate({"train": [{"path": "x"}], "max_dropped": 1.0, **keys})


def gated(
    folder: Path,
    rows: list[TokenRow],
    section: DataSection | None = None,
    max_length: int = 100,
    trained_prompts: KeyArray | None = None,
    reasons: dict[int, str] | None = None,
) -> PairColumns:
    before, scratch_path = columns_of(folder, rows, reasons)
    after = truncate(before, scratch_path, max_length)
    section = section or settings()
    split = "train" if trained_prompts is None else "eval"
    return apply_gate(before, after, section, split, max_length, trained_prompts)


def reasons_of(columns: PairColumns) -> list[str]:
    names = ["kept", *(reason.name for reason in DROP_REASONS)]
    return [names[code] for code in columns.reasons]


@pytest.mark.fault(23, "identical answers, also after truncation", becomes="dropped and counted")
def test_identical_answers(tmp_path: Path) -> None:
    rows: list[TokenRow] = [GOOD, ([1], [5, 6], [5, 6]), ([9], [5, 6, 7], [5, 6, 8])]
    assert reasons_of(gated(tmp_path, rows)) == ["kept", "identical", "kept"]
    cut = gated(tmp_path, rows, max_length=3)
    assert reasons_of(cut) == ["kept", "identical", "identical_truncated"]
    kept = gated(tmp_path, rows, settings(on_identical="keep"), max_length=3)
    assert reasons_of(kept) == ["kept"] * 3


@pytest.mark.fault(23, "a prompt that fills max_length", becomes="dropped and counted")
def test_a_prompt_that_fills_the_length(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1, 2, 3], [4], [5]), ([1, 2, 3, 4], [5], [6]), GOOD]
    assert reasons_of(gated(tmp_path, rows, max_length=4)) == ["kept", "prompt_fills", "kept"]
    assert reasons_of(gated(tmp_path, rows, max_length=3)) == ["prompt_fills"] * 2 + ["kept"]


def test_duplicates_keep_the_first_row(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1], [2], [3]), GOOD, ([1], [2], [3]), GOOD, ([1], [2], [4])]
    expected = ["kept", "kept", "duplicate", "duplicate", "kept"]
    assert reasons_of(gated(tmp_path, rows)) == expected
    assert reasons_of(gated(tmp_path, rows, settings(on_duplicate="keep"))) == ["kept"] * 5


def test_pairs_that_are_the_same_only_after_truncation_are_duplicates(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1], [2, 3, 4], [5]), ([1], [2, 3, 9], [5])]
    assert reasons_of(gated(tmp_path, rows)) == ["kept", "kept"]
    assert reasons_of(gated(tmp_path, rows, max_length=3)) == ["kept", "duplicate"]


def test_both_sides_of_a_conflict_go(tmp_path: Path) -> None:
    rows: list[TokenRow] = [
        ([1], [2], [3]),
        GOOD,
        ([1], [3], [2]),
        ([9], [3], [2]),
        ([1], [2], [3]),
    ]
    assert reasons_of(gated(tmp_path, rows)) == [
        "conflict", "kept", "conflict", "kept", "conflict"
    ]  # fmt: skip
    kept = gated(tmp_path, rows, settings(on_conflict="keep"))
    assert reasons_of(kept) == ["kept"] * 4 + ["duplicate"]


def test_a_pair_with_identical_answers_conflicts_with_nothing(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1], [2], [2]), GOOD]
    assert reasons_of(gated(tmp_path, rows, settings(on_identical="keep"))) == ["kept", "kept"]


def test_a_dropped_row_neither_conflicts_nor_repeats(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1], [2], [3]), ([1], [3], [2]), ([1], [2], [3])]
    columns = gated(tmp_path, rows, reasons={0: "empty", 1: "empty"})
    assert reasons_of(columns) == ["empty", "empty", "kept"]


def test_held_out_prompts_that_are_trained_on(tmp_path: Path) -> None:
    train = gated(tmp_path, [GOOD, ([5], [6], [6])])
    trained = train.prompt_keys[train.reasons == KEPT]
    rows: list[TokenRow] = [([1, 2], [7], [8]), ([5], [6], [7]), ([1], [2], [3])]
    # the prompt [5] was not trained on: its training pair was dropped
    expected = ["overlap", "kept", "kept"]
    assert reasons_of(gated(tmp_path, rows, trained_prompts=trained)) == expected
    kept = gated(tmp_path, rows, settings(on_overlap="keep"), trained_prompts=trained)
    assert reasons_of(kept) == ["kept"] * 3


@pytest.mark.fault(
    23,
    "empty answers and prompts",
    becomes="dropped and counted, or kept where a token is left to score",
)
def test_empty_parts_can_be_kept_where_a_token_is_left_to_score(tmp_path: Path) -> None:
    rows: list[TokenRow] = [([1], [2], [3]), ([], [2], [3]), ([1], [], [3]), GOOD]
    empty = {0: "empty", 1: "empty", 2: "empty"}
    assert reasons_of(gated(tmp_path, rows, reasons=empty)) == ["empty"] * 3 + ["kept"]
    kept = gated(tmp_path, rows, settings(on_empty="keep"), reasons=empty)
    assert reasons_of(kept) == ["kept", "empty", "empty", "kept"]


def test_a_row_counts_under_the_first_reason_that_fits(tmp_path: Path) -> None:
    filling: TokenRow = ([1, 2, 3, 4], [5], [5])
    rows = [filling, filling, GOOD]
    assert reasons_of(gated(tmp_path, rows, max_length=4)) == ["prompt_fills"] * 2 + ["kept"]
    assert reasons_of(gated(tmp_path, rows, max_length=5)) == ["identical"] * 2 + ["kept"]


@pytest.mark.parametrize(
    ("policy", "rows", "found", "remedy"),
    [
        (
            "on_identical",
            [GOOD, ([1], [2], [2])],
            "1 of 2 train rows where chosen and rejected are the same (the first is {}:2)",
            "Check the source's columns.",
        ),
        (
            "on_prompt_fills",
            [GOOD, ([1] * 100, [2], [3])],
            "1 of 2 train rows where the prompt leaves no room for an answer (the first is {}:2)",
            "Raise data.max_length.",
        ),
        (
            "on_duplicate",
            [GOOD, GOOD, GOOD],
            "2 of 3 train rows where the same pair was there before (the first is {}:2)",
            "Check whether a source is listed twice; `weight` repeats rows on purpose.",
        ),
        (
            "on_conflict",
            [([1], [2], [3]), ([1], [3], [2])],
            "2 of 2 train rows where another pair prefers the other answer (the first is {}:1)",
            "Check whether sources have chosen and rejected exchanged.",
        ),
    ],
)
def test_a_policy_of_raise(
    tmp_path: Path, policy: str, rows: list[TokenRow], found: str, remedy: str
) -> None:
    with pytest.raises(DataError) as caught:
        gated(tmp_path, rows, settings(**{policy: "raise"}))
    assert str(caught.value) == (
        f"{found.format(tmp_path / 'rows.jsonl')}; expected none, because data.{policy} is raise. "
        f"{remedy} Or set data.{policy}=drop."
    )


def test_raise_on_empty_and_on_overlap(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 train rows where the prompt or an answer is empty"):
        gated(tmp_path, [GOOD], settings(on_empty="raise"), reasons={0: "empty"})
    trained = gated(tmp_path, [GOOD]).prompt_keys
    with pytest.raises(DataError, match="1 of 1 eval rows where a training pair has its prompt"):
        gated(tmp_path, [GOOD], settings(on_overlap="raise"), trained_prompts=trained)


def test_too_many_dropped(tmp_path: Path) -> None:
    rows: list[TokenRow] = [GOOD, ([1], [2], [2]), ([3], [2], [2]), ([1] * 100, [2], [3])]
    with pytest.raises(DataError) as caught:
        gated(tmp_path, rows, settings(max_dropped=0.7))
    assert str(caught.value) == (
        "3 of 4 train rows are dropped (2 because chosen and rejected are the same, the first is "
        f"{tmp_path}/rows.jsonl:2); expected at most data.max_dropped = 70% of them. "
        "Check the source's columns. Or raise data.max_dropped."
    )
    assert reasons_of(gated(tmp_path, rows, settings(max_dropped=0.75)))[0] == "kept"


def test_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        gated(tmp_path, [GOOD, GOOD], reasons={0: "template", 1: "template"})
    assert str(caught.value) == (
        "no train pair is left of 2 rows (2 because the chat template refuses the conversation, "
        "the first is rows.jsonl:1: no system role); expected at least one pair. "
        "Set data.chat_template to one that takes these roles."
    )


def rows_of_lengths(lengths: list[int]) -> list[TokenRow]:
    """prompt + longer answer has these lengths; the other answer is one token."""
    return [([1], [2], [3] * (length - 1)) for length in lengths]


def test_auto_max_length_is_the_percentile_rounded_up(tmp_path: Path) -> None:
    columns, _ = columns_of(tmp_path, rows_of_lengths(list(range(2, 202))))
    length, reason = choose_max_length(columns, "auto", None)
    # nearest rank: the 198th of the 200 lengths 2..201 is 199
    assert length == 200
    assert reason == (
        "200 (auto: p99 of prompt + longer answer over 200 training pairs is 199, "
        "rounded up to a multiple of 8)"
    )


def test_auto_max_length_looks_at_usable_pairs_only_and_stays_in_the_model(
    tmp_path: Path,
) -> None:
    columns, _ = columns_of(tmp_path, rows_of_lengths([10, 16, 500]), {2: "empty"})
    assert choose_max_length(columns, "auto", 512)[0] == 16
    length, reason = choose_max_length(columns, "auto", 14)
    assert length == 14
    assert reason == (
        "14 (auto: all positions of the model; p99 of prompt + longer answer over 2 training "
        "pairs is 16, rounded up to a multiple of 8 is 16)"
    )


def test_a_given_max_length(tmp_path: Path) -> None:
    columns, _ = columns_of(tmp_path, [GOOD])
    assert choose_max_length(columns, 1000, None) == (1000, "1,000 (data.max_length)")
    with pytest.raises(DataError) as caught:
        choose_max_length(columns, 1000, 512)
    assert str(caught.value) == (
        "data.max_length 1000 is above the model's 512 positions; expected at most 512. "
        "Lower it, or take a model with longer context."
    )


def test_auto_max_length_without_a_usable_pair(tmp_path: Path) -> None:
    columns, _ = columns_of(tmp_path, [GOOD], {0: "no_shared_prompt"})
    with pytest.raises(DataError, match="no train pair is left of 1 rows"):
        choose_max_length(columns, "auto", None)


def test_keys_that_end_in_zero_bytes_are_compared_whole(tmp_path: Path) -> None:
    # numpy hands out such keys without their zeros; one in 256 keys ends so
    rows: list[TokenRow] = [([n], [n + 1], [n + 2]) for n in range(2000)]
    columns = gated(tmp_path, [*rows, *rows])
    ends_in_zero = columns.pair_keys.view(np.uint8).reshape(-1, 16)[:, -1] == 0
    assert ends_in_zero.any()
    assert reasons_of(columns) == ["kept"] * 2000 + ["duplicate"] * 2000
