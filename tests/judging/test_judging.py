"""Pairwise judging without a judge: prompt, verdict, table."""

import pytest

from dpo_dist.judging.comparison import (
    Dialogue,
    Tally,
    judge_messages,
    outcome_of,
    parse_verdict,
    request_digest,
    tally,
    winner_of,
)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is right.\n[[A]]", "A"),
        ("[[ b ]]", "B"),
        ("My verdict: [[C]]. Again: [[C]]", "C"),
        ("<think>[[A]]? no</think>\n[[B]]", "B"),
        ("<think>[[A]] so far, but", None),
        ("<think>A", None),
        ("<think>one</think> <think>[[A]]</think>\n[[B]]", "B"),
        ("**A**", "A"),
        ("[C]\n", "C"),
        ("[[A]] if A is better, [[B]] if B is, [[C]] for a tie", None),
        ("[[A]] or [[B]]", None),
        ("A is better", None),
        ("I cannot choose.", None),
        ("[A] is better", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_verdicts(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_a_letter_means_whoever_was_shown_there() -> None:
    assert [winner_of(letter, 1) for letter in "ABC"] == ["first", "second", "tie"]
    assert [winner_of(letter, 2) for letter in "ABC"] == ["second", "first", "tie"]


def test_both_orders_have_to_agree() -> None:
    assert outcome_of("first", "first") == "win"
    assert outcome_of("second", "second") == "loss"
    assert outcome_of("tie", "tie") == "tie"
    for pair in (("first", "second"), ("first", "tie"), ("tie", "second")):
        assert outcome_of(*pair) == outcome_of(*reversed(pair)) == "changed"
    assert outcome_of("first", None) == outcome_of(None, None) == "error"


def test_the_table_and_its_arithmetic() -> None:
    kinds = ["win"] * 5 + ["loss"] * 2 + ["tie"] + ["changed"] * 2 + ["error"] * 3
    counted = tally(enumerate(kinds))
    assert counted == Tally(win=5, loss=2, tie=3, changed=2, error=3, num_questions=10)
    assert counted.row() == {
        "win": 5, "loss": 2, "tie": 3,
        "win_rate": 0.5, "loss_rate": 0.2, "win_rate_adjusted": 0.65,
    }  # fmt: skip
    other = counted.turned_round().row()
    assert (other["win"], other["loss"], other["win_rate_adjusted"]) == (2, 5, 0.35)
    # by hand: (0.65 + 0.19207 -+ 1.96 sqrt(0.02275 + 0.0096036)) / 1.38415
    assert counted.interval() == pytest.approx((0.60837 - 0.25470, 0.60837 + 0.25470), abs=2e-5)
    assert counted.arithmetic() == [
        "tie 3 = 1 said in both orders + 2 where the orders disagreed",
        "win_rate_adjusted = (win 5 + 0.5 x tie 3) / n 10 = 0.6500",
        "95 % interval {:.4f} .. {:.4f} (Wilson, p 0.6500, n 10 questions, z 1.96)".format(
            *counted.interval()
        ),
    ]


def test_winning_always_is_not_certainty() -> None:
    low, high = tally((number, "win") for number in range(10)).interval()
    assert low == pytest.approx(10 / (10 + 1.96**2), abs=1e-3) and high == pytest.approx(1.0)


def test_turns_of_a_question_count_once_for_the_interval() -> None:
    counted = tally([(1, "win"), (1, "win"), (2, "loss"), (2, "error")])
    assert counted.n == 3 and counted.num_questions == 2


def test_the_judge_sees_both_dialogues_in_the_order_asked_for() -> None:
    ours = Dialogue("Hi", ("And now?",), ("one", "two"))
    theirs = Dialogue("Hi", ("And now?",), ("three", "four"))
    system, user = judge_messages(ours, theirs)
    assert system["role"] == "system" and "[[C]]" in system["content"]
    text = user["content"]
    places = [text.index(part) for part in ("Hi", "one", "two", "three", "four")]
    assert places == sorted(places) and text.count("And now?") == 2
    assert "last message" in text
    assert "last message" not in judge_messages(Dialogue("Hi", (), ("a",)), ours)[1]["content"]


def test_whatever_changes_the_verdict_changes_the_digest() -> None:
    ours, theirs = Dialogue("Hi", (), ("one",)), Dialogue("Hi", (), ("two",))
    usual = request_digest(judge_messages(ours, theirs), "j", {"temperature": 0.0})
    others = [
        request_digest(judge_messages(theirs, ours), "j", {"temperature": 0.0}),
        request_digest(judge_messages(ours, Dialogue("Hi", (), ("2",))), "j", {"temperature": 0.0}),
        request_digest(judge_messages(ours, theirs), "k", {"temperature": 0.0}),
        request_digest(judge_messages(ours, theirs), "j", {"temperature": 0.5}),
    ]
    assert len({usual, *others}) == 5
    assert usual == request_digest(judge_messages(ours, theirs), "j", {"temperature": 0.0})
